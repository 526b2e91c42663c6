"""Has the CPU kernels multiply by the matrices of routers, which choose a token's experts.

A router multiplies by a matrix of its own that no linear layer holds. The last bits of torch's
product depend on how many rows there are, and so may what a token is routed to, and with what
weight: a mixture would answer otherwise alone than among others, though its experts do not. Other
code that multiplies by a matrix itself is served in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.cpu import CpuKernels
from ..kernels.packed_linear import is_linear

_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class ProductsByKernel(TorchFunctionMode):
    """Computes products with one matrix by a kernel while it is entered.

    Args:
        kernels: that compute them.
        matrix: fp32 [N, K].
    """

    def __init__(self, kernels: CpuKernels, matrix: Tensor) -> None:
        super().__init__()
        self._kernels = kernels
        self._matrix = matrix
        self._packed: Tensor | None = None  # until it is used: not all are

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch calls this in place of its functions."""
        if function is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if function in _MATMUL and self._takes(*args):
            return self._product(args[1].transpose(-1, -2)).transpose(-1, -2)
        return function(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._product(x, bias) if self._takes(matrix, x) else F.linear(x, matrix, bias)

    def _takes(self, matrix: Tensor, x: Tensor) -> bool:
        is_ours = matrix.data_ptr() == self._matrix.data_ptr() and matrix.dim() == 2
        return is_ours and x.dtype is torch.float32

    def _product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows x [..., K] times the matrix [N, K], transposed."""
        if self._packed is None:
            self._packed = self._kernels.pack_weight(self._matrix)
        return self._kernels.linear(x, self._packed, bias, len(self._matrix))


def multiply_by_kernel(
    model: nn.Module, kernels: CpuKernels, left: Collection[nn.Module] = ()
) -> int:
    """Has the kernels compute the products of a model's routers with their matrices.

    Everything else of a router, and of modules that only look like one, stays as it is.

    Args:
        model: changed in place.
        kernels: that compute the products.
        left: linear layers that are not packed, so that they are as routers are.

    Returns:
        How many modules have such a matrix.
    """
    count = 0
    for module in model.modules():
        matrix = _own_matrix(module)
        if matrix is not None and (not is_linear(module) or module in left):
            module.forward = multiplying(module.forward, kernels, matrix)
            count += 1
    return count


def multiplying(
    forward: Callable[..., Any], kernels: CpuKernels, matrix: Tensor
) -> Callable[..., Any]:
    """A forward whose products with an fp32 matrix [N, K] are computed by the kernels."""
    return partial(_forward, ProductsByKernel(kernels, matrix), forward)


def _own_matrix(module: nn.Module) -> Tensor | None:
    """The fp32 matrix of a module that may be a router, or of a linear layer."""
    matrix = dict(module.named_parameters(recurse=False)).get("weight")
    if matrix is None or matrix.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return matrix.detach() if matrix.dtype is torch.float32 else None


def _forward(
    products: ProductsByKernel, stock: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with products:
        return stock(*args, **kwargs)
