"""Imports torch and transformers without what an engine does not use of them.

Otherwise half of the time until an engine is ready would go into modules of which nothing is
called: torch's compiler, which transformers uses at its import to mark functions that
`torch.compile` is to leave alone, and tensors that are divided among processes.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"


@contextmanager
def lean_imports(*, is_divided: bool = False) -> Iterator[None]:
    """Within it imports are quick: of what follows, and without collections of garbage.

    What is left out is imported when it is first used, by code that comes with a model for example.

    Args:
        is_divided: whether the model is divided among ranks.
    """
    was_collecting = gc.isenabled()
    gc.disable()  # modules are no garbage, and would be visited again and again: 0.4 s
    try:
        _defer_compiler()
        if not is_divided:
            _hide_distribution()
        yield
    finally:
        if was_collecting:
            gc.enable()


def _hide_distribution() -> None:
    """Lets transformers remember that tensors are never divided, as with some builds of torch."""
    import torch.distributed
    from transformers.utils.import_utils import is_torch_distributed_available

    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # keeps its first answer
    finally:
        torch.distributed.is_available = is_available


def _defer_compiler() -> None:
    """Lets the first use of torch's compiler import it."""
    import torch

    spec = find_spec(_COMPILER) if _COMPILER not in sys.modules else None
    if spec is None:
        return
    module = _Deferred(_COMPILER)
    module.__spec__, module.__file__ = spec, spec.origin
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_COMPILER] = module
    torch._dynamo = module


class _Deferred(ModuleType):
    """Stands for the compiler until something of it is used that is no mark."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of modules: who looks through all of them uses none
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER], sys.modules["torch"]._dynamo
        return getattr(importlib.import_module(_COMPILER), name)

    def disable(self, fn: Any = None, *_: Any, **__: Any) -> Any:
        """The function itself, or a decorator that returns it."""
        return _itself if fn is None else fn

    def assume_constant_result(self, fn: Any) -> Any:
        """The function itself."""
        return fn

    def allow_in_graph(self, fn: Any) -> Any:
        """The function itself."""
        return fn


def _itself(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn
