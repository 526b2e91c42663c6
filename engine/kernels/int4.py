"""A linear layer with int4 weights in groups, and int8 activations.

The weights of a group share a scale and a least value; activations have one scale per row, computed
from the row. This module knows how weights are rounded and laid out; the product itself is in
`c/int4.h`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import CpuKernels
from .cpu_quantized import Int4Weight
from .quantized_linear import QuantizedLinear

GROUP_SIZE = 64  # weights that share a scale and a least value: 4.5 bits per weight in total
# Of formats that have 4 bits already (GGUF's Q4_0, Q4_1 and Q4_K), and where 64 do not divide K: 5
# bits per weight.
SMALL_GROUP_SIZE = 32
MAX_LEVEL = 15
_EVEN_TOLERANCE = 0.1  # of a level; bfloat16 rounds the eighth to 0.03
_TRIED_ROWS = 8  # of a weight, before all of it is looked at
_LEAST_SCALE = 1e-30


class Groups(NamedTuple):
    """A weight [N, K] as levels 0 … 15, int32 [N, K], in groups along K.

    `scales` and `least` are fp32 [N, K / group]; a weight is about level * scale + least.
    """

    levels: Tensor
    scales: Tensor
    least: Tensor


class PackedInt4Linear(QuantizedLinear[Int4Weight]):
    """Replaces an fp32 nn.Linear on the CPU; holds panels of 4-bit levels instead of the weight."""

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> Int4Weight:
        """Quantise a weight [N, K] and lay it out for the kernel."""
        return pack_int4(group_weight(weight), bias, kernels)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a weight [N, K] of this shape has whole groups."""
        return weight.shape[1] % SMALL_GROUP_SIZE == 0

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias, with x rounded to 8 bits and weight to 4."""
        return self._kernels.int4_linear(x, self.quantized, self.out_features, ends)


def pack_int4(groups: Groups, bias: Tensor | None, kernels: CpuKernels) -> Int4Weight:
    """Lay out a weight for the kernel; scales and least values are rounded to bfloat16."""
    out_features, in_features = groups.levels.shape
    width = kernels.panel_width
    panels, num_groups = -(-out_features // width), groups.scales.shape[1]
    rows = torch.zeros(panels * width, in_features, dtype=torch.uint8)
    rows[:out_features] = groups.levels
    lower, upper = rows.view(panels, width, -1, 2, 4).unbind(3)  # of eight steps of K
    packed = kernels.empty_weight((panels, in_features // 8, width, 4), torch.uint8)
    packed.copy_((lower | upper << 4).transpose(1, 2))
    # A lane of 32 bits has the scale first, which is its lower half.
    pairs = torch.zeros(panels * width, num_groups, 2, dtype=torch.bfloat16)
    pairs[:out_features] = torch.stack([groups.scales, groups.least], dim=-1)
    lanes = pairs.view(torch.int32).view(panels, width, num_groups)
    laid_out = kernels.empty_weight((panels, num_groups, width), torch.int32)
    laid_out.copy_(lanes.transpose(1, 2))
    biases = torch.zeros(panels * width)
    if bias is not None:
        biases[:out_features] = bias.detach()
    return Int4Weight(packed, laid_out, biases)


def group_weight(weight: Tensor) -> Groups:
    """Round a weight [N, K] to 16 evenly spaced values between the extremes of every 64 of a row.

    Of every 32 where K is no multiple of 64. A weight that consists of groups of 32 with such
    values keeps them: that is how dequantised weights of four bits look.
    """
    even = _even_groups(weight)
    if even is not None:
        return even
    size = SMALL_GROUP_SIZE if weight.shape[1] % GROUP_SIZE else GROUP_SIZE
    groups = weight.float().reshape(len(weight), -1, size)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return _levels(groups, low, ((high - low) / MAX_LEVEL).clamp(min=_LEAST_SCALE))


def _even_groups(weight: Tensor) -> Groups | None:
    """The same of groups of 32, if each has no other than 16 evenly spaced values."""
    if len(weight) > _TRIED_ROWS and _even_groups(weight[:_TRIED_ROWS]) is None:
        return None
    groups = weight.float().reshape(len(weight), -1, SMALL_GROUP_SIZE)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = torch.zeros_like(low)
    for count in range(MAX_LEVEL, 0, -1):  # steps between the extremes
        tried = ((high - low) / count).clamp(min=_LEAST_SCALE)
        steps = (groups - low) / tried
        fits = ((steps - steps.round()).abs() < _EVEN_TOLERANCE).all(dim=-1, keepdim=True)
        scales = torch.where(fits & (scales == 0), tried, scales)
        if bool((scales > 0).all()):
            return _levels(groups, low, scales)
    return None


def _levels(groups: Tensor, low: Tensor, scales: Tensor) -> Groups:
    levels = ((groups - low) / scales).round().clamp(0, MAX_LEVEL).int()
    return Groups(levels.flatten(1), scales.squeeze(-1), low.squeeze(-1))
