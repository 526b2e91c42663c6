"""Packs the matrices of heads of layers with latent attention for the CPU kernels.

Rows are sorted by head as those of experts are by expert, so one call multiplies those of all
heads; and a row's product does not depend on the others, as that of torch's does.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..attention.latent import HeadMatrices, replace_products
from ..kernels.cpu import CpuKernels
from ..kernels.packed_linear import PackedLinear
from .experts import layer_of_matrices


class PackedHeads:
    """Multiplies rows by the matrix of their head.

    Args:
        matrices: fp32; they are not kept.
        kernels: for which they are packed.
    """

    def __init__(self, matrices: HeadMatrices, kernels: CpuKernels) -> None:
        def make(linear: nn.Module) -> nn.Module:
            assert isinstance(linear, nn.Linear)
            return PackedLinear.from_linear(linear, kernels)

        self._heads = torch.arange(1, len(matrices.weight) + 1)
        self._layer = layer_of_matrices(matrices.weight, None, make, kernels)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows times their head's matrix, as `HeadMatrices`."""
        num_heads, num_tokens, _ = rows.shape
        found: Tensor = self._layer(rows.flatten(0, 1), self._heads * num_tokens)
        return found.view(num_heads, num_tokens, -1)


def pack_latents(model: nn.Module, kernels: CpuKernels) -> None:
    """Packs the matrices of all such layers of an fp32 model."""
    replace_products(model, partial(PackedHeads, kernels=kernels))
