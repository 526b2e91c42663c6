"""Has a CPU kernel compute the sigmoids, SiLUs, GELUs and softpluses for which a model calls torch.

Torch computes the numbers at the end of each thread's share by another formula than the rest. So
what a sigmoid gives for a token, in a router or at a gate, depends on the tokens with it in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from ..kernels.cpu import Activation, CpuKernels


class _Calls(TorchFunctionMode):
    """Notes the modules in whose own code torch is called for such a function, while entered.

    Args:
        model: of which they are; what it calls beside them belongs to the module that calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.callers: dict[nn.Module, None] = {}  # in order
        self._modules = frozenset(model.modules())
        self._running: list[nn.Module] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch calls this in place of its functions."""
        if self._running and _activation(function, args, kwargs or {}) is not None:
            self.callers[self._running[-1]] = None
        return function(*args, **(kwargs or {}))

    def watch(self, compute: Callable[[], object]) -> None:
        """Runs a model."""
        handles = (
            hooks.register_module_forward_pre_hook(self._begin),
            hooks.register_module_forward_hook(self._end, always_call=True),
        )
        try:
            with self:
                compute()
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, *_: Any) -> None:
        if module in self._modules:
            self._running.append(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        if module in self._modules:
            self._running.pop()


class _ByKernel(TorchFunctionMode):
    """Computes such functions by a kernel while it is entered."""

    def __init__(self, kernels: CpuKernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch calls this in place of its functions."""
        activation = _activation(function, args, kwargs or {})
        if activation is None:
            return function(*args, **(kwargs or {}))
        return self._kernels.activate(args[0], activation)


def activate_by_kernel(model: nn.Module, kernels: CpuKernels, compute: Callable[[], object]) -> int:
    """Has a kernel compute the activations of the modules that call torch for them.

    Args:
        model: its modules are watched.
        kernels: that compute them.
        compute: runs the model.

    Returns:
        How many modules there are.
    """
    calls = _Calls(model)
    calls.watch(compute)
    for module in calls.callers:
        module.forward = partial(_forward, _ByKernel(kernels), module.forward)
    return len(calls.callers)


def _activation(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """Which activation a call of torch asks for, if a kernel can compute it; not one in place."""
    find = _ACTIVATIONS.get(function)
    x = args[0] if args else None
    if find is None or not isinstance(x, Tensor) or x.dtype is not torch.float32 or x.is_meta:
        return None
    return find(*args[1:], **kwargs)


def _silu(inplace: bool = False) -> Activation | None:
    return None if inplace else Activation.SILU


def _gelu(approximate: str = "none") -> Activation:
    return Activation.GELU_TANH if approximate == "tanh" else Activation.GELU


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation | None:
    return Activation.SOFTPLUS if (beta, threshold) == (1.0, 20.0) else None


def _sigmoid(out: Tensor | None = None) -> Activation | None:
    return Activation.SIGMOID if out is None else None


_ACTIVATIONS: dict[Any, Callable[..., Activation | None]] = {
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.silu: _silu,
    F.gelu: _gelu,
    F.softplus: _softplus,
}


def _forward(by_kernel: _ByKernel, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with by_kernel:
        return stock(*args, **kwargs)
