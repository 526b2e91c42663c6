"""A linear layer with int8 weights in groups of 32, kept as a file has them, and int8 activations.

That is how GGUF's Q8_0 stores weights: 32 integers of 8 bits and a float16 scale. transformers
hands out their products, in which both are found again. Q5_0 and Q4_0 are whole multiples of such
scales as well. Activations have one scale per row. The product itself is in `c/grouped_int8.h`.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .cpu import CpuKernels
from .cpu_quantized import GroupedInt8Weight
from .int8 import MAX_LEVEL, PackedInt8Linear
from .packed_linear import output_rows
from .quantized_linear import QuantizedLinear

GROUP_SIZE = 32
# The largest magnitude of a group's integers; those of Q8_0, Q5_0 and Q4_0 first.
_TOPS = (127, 16, 8, *range(126, 0, -1))
_ROWS_AT_ONCE = 1024  # of a weight, to bound what that takes in memory


class Groups(NamedTuple):
    """A weight [N, K] as levels, int8 [N, K], times scales, float16 [N, K / 32]: exactly that."""

    levels: Tensor
    scales: Tensor


class GroupedInt8Linear(QuantizedLinear[GroupedInt8Weight]):
    """Replaces an fp32 nn.Linear whose weight consists of such groups, and computes with them."""

    @classmethod
    def from_groups(cls, groups: Groups, bias: Tensor | None, kernels: CpuKernels) -> Self:
        """Lay out a weight [N, K]; the bias is [N]."""
        out_features, in_features = groups.levels.shape
        return cls(kernels, pack_groups(groups, bias, kernels), in_features, out_features)

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> GroupedInt8Weight:
        """Lay out a weight [N, K] that consists of groups.

        Raises:
            ValueError: it does not.
        """
        groups = find_groups(weight)
        if groups is None:
            raise ValueError("the weight is not of integers and float16 scales")
        return pack_groups(groups, bias, kernels)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias, with x rounded to 8 bits."""
        return self._kernels.grouped_int8_linear(x, self.quantized, self.out_features, ends)


def int8_linear(layer: nn.Module, kernels: CpuKernels) -> GroupedInt8Linear | PackedInt8Linear:
    """The int8 layer that replaces an fp32 layer; a weight that has 8 bits already keeps them."""
    groups = find_groups(output_rows(layer).detach())
    if groups is None:
        return PackedInt8Linear.from_linear(layer, kernels)
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return GroupedInt8Linear.from_groups(groups, bias, kernels)


def find_groups(weight: Tensor) -> Groups | None:
    """The groups that an fp32 weight [N, K] consists of, exactly; None for any other weight."""
    if weight.shape[1] % GROUP_SIZE or _find_scales(weight[:1, :GROUP_SIZE]) is None:
        return None
    levels, scales = [], []
    for rows in torch.split(weight, _ROWS_AT_ONCE):
        groups = rows.reshape(-1, GROUP_SIZE)
        found = _find_scales(groups)
        if found is None:
            return None
        nonzero = found.where(found > 0, 1.0)
        levels.append((groups / nonzero).round().to(torch.int8).view(len(rows), -1))
        scales.append(found.half().view(len(rows), -1))
    return Groups(torch.cat(levels), torch.cat(scales))


def _find_scales(groups: Tensor) -> Tensor | None:
    """fp32 [num_groups, 1], float16 numbers of which the weights of each group are multiples.

    Args:
        groups: fp32 [num_groups, 32].
    """
    tops = groups.abs().amax(dim=1, keepdim=True)
    scales = torch.zeros_like(tops)
    open_groups = tops.flatten().nonzero().flatten()
    for top in _TOPS:
        if not len(open_groups):
            break
        weights, tried = groups[open_groups], (tops[open_groups] / top).half().float()
        steps = (weights / tried).round()
        fits = ((steps * tried == weights) & (steps.abs() <= MAX_LEVEL)).all(dim=1)
        scales[open_groups[fits]] = tried[fits]
        open_groups = open_groups[~fits]
    return None if len(open_groups) else scales


def pack_groups(groups: Groups, bias: Tensor | None, kernels: CpuKernels) -> GroupedInt8Weight:
    """Lay out a weight for the kernel; nothing is rounded."""
    out_features, in_features = groups.levels.shape
    width = kernels.panel_width
    panels = -(-out_features // width)
    rows = torch.zeros(panels * width, in_features, dtype=torch.int8)
    rows[:out_features] = groups.levels
    packed = kernels.empty_weight((panels, in_features // 4, width, 4), torch.int8)
    packed.copy_(rows.view(panels, width, -1, 4).transpose(1, 2))
    dtype = torch.float16 if kernels.has_float16 else torch.float32
    columns = torch.zeros(panels * width, groups.scales.shape[1], dtype=dtype)
    columns[:out_features] = groups.scales
    scales = kernels.empty_weight((panels, groups.scales.shape[1], width), dtype)
    scales.copy_(columns.view(panels, width, -1).transpose(1, 2))
    biases = torch.zeros(panels * width)
    if bias is not None:
        biases[:out_features] = bias.detach()
    return GroupedInt8Weight(packed, scales, biases)
