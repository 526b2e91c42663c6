"""A linear layer with int8 weights and activations, whose products are exact.

Weights have one scale per output channel, activations one per row, computed from the row. This
module knows how weights are rounded and laid out; the product itself is in `c/int8.h`.
"""

import torch
from torch import Tensor

from .cpu import CpuKernels
from .cpu_quantized import Int8Weight
from .quantized_linear import QuantizedLinear

MAX_LEVEL = 127  # -128 is not used, so that levels are symmetric
MAX_IN_FEATURES = 2**17  # sums of more products than this could overflow int32
_LEAST_SCALE = 1e-30  # smaller scales are raised to this; `c/rounded_rows.h` has the same constant


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row [..., K] to 8 bits, scaled by its largest magnitude.

    Returns:
        int8 [..., K], the levels, and fp32 [..., 1], the scales; levels times scale is about x. If
        a row is not finite, its scale is not finite either.
    """
    top = x.abs().amax(dim=-1, keepdim=True).float()
    scales = (top / MAX_LEVEL).clamp(min=_LEAST_SCALE)
    return (x / scales).round().to(torch.int8), scales


class PackedInt8Linear(QuantizedLinear[Int8Weight]):
    """Replaces an fp32 nn.Linear on the CPU; holds panels of 8-bit levels instead of the weight."""

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> Int8Weight:
        """See `pack_int8`."""
        return pack_int8(weight, bias, kernels)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias, with x and weight rounded to 8 bits."""
        return self._kernels.int8_linear(x, self.quantized, self.out_features, ends)


def pack_int8(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> Int8Weight:
    """Quantise a weight [N, K] and lay it out for the kernel.

    Raises:
        ValueError: K is too large for exact sums in int32.
    """
    out_features, in_features = weight.shape
    if in_features > MAX_IN_FEATURES:
        raise ValueError(f"int8 layers have at most {MAX_IN_FEATURES} inputs. Given: {in_features}")
    width = kernels.panel_width
    panels, groups = -(-out_features // width), -(-in_features // 4)
    levels, scales = quantize_rows(weight)
    padded = levels.new_zeros(panels * width, groups * 4)
    padded[:out_features, :in_features] = levels
    packed = kernels.empty_weight((panels, groups, width, 4), torch.int8)
    packed.copy_(padded.view(panels, width, groups, 4).transpose(1, 2))
    outputs = torch.zeros(2, panels * width)
    outputs[0, :out_features] = scales.squeeze(1)
    if bias is not None:
        outputs[1, :out_features] = bias.detach()
    columns = padded.sum(dim=1, dtype=torch.int32)
    return Int8Weight(packed, outputs[0].clone(), columns, outputs[1].clone())
