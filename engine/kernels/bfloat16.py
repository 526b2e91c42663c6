"""A linear layer whose weights and activations are rounded to bfloat16, and multiplied in pairs.

Sums, and all that is not such a layer, stay in float32. The product itself is in `c/linear.h`.
"""

from typing import NamedTuple

from torch import Tensor

from .cpu import CpuKernels
from .quantized_linear import QuantizedLinear


class PairWeight(NamedTuple):
    """A weight that `CpuKernels.pack_pairs` made, and its bias."""

    packed: Tensor
    bias: Tensor | None


class PackedBfloat16Linear(QuantizedLinear[PairWeight]):
    """Replaces an fp32 nn.Linear on the CPU; holds panels of pairs instead of the weight."""

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> PairWeight:
        """Round a weight [N, K] and lay it out for the kernel."""
        bias = None if bias is None else bias.detach().float().contiguous()
        return PairWeight(kernels.pack_pairs(weight), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, with x and weight rounded to bfloat16."""
        packed, bias = self.quantized
        return self._kernels.pair_linear(x, packed, bias, self.out_features)
