"""Imports torch and transformers without what an engine does not use of them.

Otherwise half of the time until an engine is ready, and 60 MB, would go into modules of which
nothing is called: torch's compiler, which transformers uses at its import to mark functions that
`torch.compile` is to leave alone, tensors that are divided among processes, and symbolic sizes with
sympy, of which every operation on the meta device asks whether a plain number is one.
"""

from __future__ import annotations

import gc
import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_ALGEBRA = "sympy"
_IMAGES = "torchvision"


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
        _defer()
        _hide_torchvision()
        if not is_divided:
            _hide_distribution()
        yield
    finally:
        if was_collecting:
            gc.enable()


def _hide_torchvision() -> None:
    """Lets transformers remember that torchvision is not installed, whose images are none of ours.

    It takes a second, and ends the start: it imports a part of torch's compiler without the rest.
    """
    if _IMAGES in sys.modules:
        return
    # What the import system takes for a module that there is not.
    sys.modules[_IMAGES] = None  # type: ignore[assignment]
    try:
        from transformers.utils.import_utils import is_torchvision_available  # asks, too

        is_torchvision_available()  # keeps its first answer
    finally:
        del sys.modules[_IMAGES]


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


def _defer() -> None:
    """Lets the first use of torch's compiler, of symbolic sizes and of sympy import them."""
    for name, kind in ((_COMPILER, _Compiler), (_SHAPES, _Shapes), (_ALGEBRA, _Algebra)):
        spec = find_spec(name) if name not in sys.modules else None
        if spec is None:
            continue
        module = kind(name)
        module.__spec__, module.__file__ = spec, spec.origin
        if spec.submodule_search_locations is not None:
            module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module
        _set_in_parent(name, module)


def _set_in_parent(name: str, module: ModuleType) -> None:
    """What the import system does after the import of a part of a package."""
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _Deferred(ModuleType):
    """Stands for a module until something of it is used that this class does not have itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of modules: who looks through all of them uses none
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """The module itself, which has those of its parts that were imported before it."""
        if sys.modules.get(self.__name__) is not self:
            return sys.modules[self.__name__]
        del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        _set_in_parent(self.__name__, module)
        for name, part in vars(self).items():
            if isinstance(part, ModuleType) and not hasattr(module, name):
                setattr(module, name, part)
        return module


class _Compiler(_Deferred):
    """Marks functions, which changes nothing as long as nothing is compiled."""

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


def _known(name: str) -> Callable[..., Any]:
    """A question about a truth value, which is its own answer unless it is symbolic."""

    def ask(self: _Shapes, value: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(value, bool):
            return value
        return getattr(self.real(), name)(value, *arguments, **options)

    return ask


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float)


def _sizes(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


class _Shapes(_Deferred):
    """Answers what operations on the meta device ask of sizes; they are hardly symbolic."""

    expect_true = _known("expect_true")
    guard_or_false = _known("guard_or_false")
    guard_or_true = _known("guard_or_true")
    guard_size_oblivious = _known("guard_size_oblivious")
    statically_known_true = _known("statically_known_true")

    def guarding_hint_or_throw(self, value: Any) -> Any:
        """A size itself, unless it is symbolic."""
        return value if _is_plain(value) else self.real().guarding_hint_or_throw(value)

    def has_guarding_hint(self, value: Any) -> bool:
        """Whether a size is known: plain numbers are."""
        return _is_plain(value) or bool(self.real().has_guarding_hint(value))

    def sym_and(self, *values: Any) -> Any:
        """Whether all are true; an expression if one of them is symbolic."""
        return reduce(operator.and_, values)

    def sym_or(self, *values: Any) -> Any:
        """Whether one is true; an expression if one of them is symbolic."""
        return reduce(operator.or_, values)

    def sym_eq(self, left: Any, right: Any) -> Any:
        """Whether sizes or shapes are the same; an expression if one of them is symbolic."""
        if all(map(_is_plain, (*_sizes(left), *_sizes(right)))):
            return _sizes(left) == _sizes(right)
        return self.real().sym_eq(left, right)

    def is_nested_int(self, value: Any) -> bool:
        """Whether a size is that of tensors in a tensor: no plain number is."""
        return not _is_plain(value) and bool(self.real().is_nested_int(value))


class _ExpressionType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        sympy = sys.modules.get(_ALGEBRA)
        return not isinstance(sympy, _Algebra | None) and isinstance(instance, sympy.Basic)


class _Expression(metaclass=_ExpressionType):
    """Has the instances of sympy's type of expressions: none before sympy is imported."""


class _Algebra(_Deferred):
    """Is asked whether plain numbers are expressions."""

    Basic = _Expression
