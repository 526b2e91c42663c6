"""What linear layers with quantised weights on the CPU have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Self, TypeVar

from torch import Tensor, nn

from .cpu import CpuKernels, required
from .packed_linear import output_rows

Weight = TypeVar("Weight", bound=tuple[Tensor | None, ...])


class QuantizedLinear(nn.Module, Generic[Weight]):
    """Replaces an fp32 nn.Linear on the CPU; holds panels of levels instead of the weight.

    Args:
        kernels: that compute it.
        quantized: the weight, as `pack` makes it.
        in_features: of the layer.
        out_features: of the layer.
    """

    def __init__(
        self, kernels: CpuKernels, quantized: Weight, in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quantized = quantized
        for number, tensor in enumerate(quantized):  # so that they are found as weights
            self.register_buffer(f"quantized_{number}", tensor, persistent=False)
        self._kernels = kernels

    @classmethod
    def from_linear(cls, linear: nn.Module, kernels: CpuKernels | None = None) -> Self:
        """Quantise the weight of an fp32 layer; the layer itself is left as it is.

        Raises:
            RuntimeError: there are no kernels on this machine.
        """
        kernels = kernels or required()
        weight, bias = output_rows(linear).detach(), linear.bias
        assert bias is None or isinstance(bias, Tensor)
        out_features, in_features = weight.shape
        return cls(kernels, cls.pack(weight, bias, kernels), in_features, out_features)

    @staticmethod
    @abstractmethod
    def pack(weight: Tensor, bias: Tensor | None, kernels: CpuKernels) -> Weight:
        """Quantise a weight [N, K] and lay it out for the kernel."""

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
