"""Functions of single numbers, and of rows, by C kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .addresses import flat
from .cpu_library import CpuLibrary
from .kernel import FLOAT, INT, POINTER, SIZE, Kernel


class ElementwiseKernels(CpuLibrary):
    """Sums, norms and activations."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._add = self._kernel("add", POINTER, POINTER, POINTER, SIZE, INT)
        self._rms_norm = self._kernel(
            "rms_norm", POINTER, POINTER, POINTER, SIZE, SIZE, FLOAT, FLOAT, INT
        )
        gated = POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, SIZE, INT
        self._silu_and_mul = self._kernel("silu_and_mul", *gated)
        self._gelu_and_mul = self._kernel("gelu_and_mul", *gated)
        self._activate = self._kernel("activate", POINTER, POINTER, SIZE, INT, INT)

    def add(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        """Write a + b into output; all three fp32 of one shape, contiguous."""
        if a.shape != b.shape or a.shape != output.shape:
            raise ValueError("a, b and output differ in shape")
        self._add(
            flat(a, torch.float32),
            flat(b, torch.float32),
            flat(output, torch.float32),
            a.numel(),
            torch.get_num_threads(),
        )

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, *, weight_offset: float = 0.0
    ) -> Tensor:
        """Return x / rms(x) * (weight_offset + weight) over the last dimension."""
        width = x.shape[-1]
        if x.dtype != torch.float32 or weight.numel() != width:
            raise ValueError(f"expected fp32 rows of width {weight.numel()}")
        x = x.contiguous()
        output = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            flat(weight, torch.float32),
            output.data_ptr(),
            x.numel() // width,
            width,
            epsilon,
            weight_offset,
            torch.get_num_threads(),
        )
        return output

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up; both [T, width], possibly column slices of one tensor."""
        return self._gated(self._silu_and_mul, gate, up)

    def gelu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `silu_and_mul`, with GELU as approximated by tanh."""
        return self._gated(self._gelu_and_mul, gate, up)

    def _gated(self, kernel: Kernel, gate: Tensor, up: Tensor) -> Tensor:
        """Call a kernel for activation(gate) * up."""
        rows, width = gate.shape
        if gate.shape != up.shape or gate.dtype != torch.float32 or up.dtype != torch.float32:
            raise ValueError("gate and up must be fp32 of one shape")
        if gate.stride(1) != 1 or up.stride(1) != 1:
            raise ValueError("rows of gate and up must be contiguous")
        output = self._empty_rows(gate, width)
        kernel(
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            output.data_ptr(),
            rows,
            width,
            torch.get_num_threads(),
        )
        return output

    def activate(self, x: Tensor, activation: int) -> Tensor:
        """Return an `Activation` of fp32 x, of its shape. A number's does not depend on the others.

        The sigmoid of numbers below -87 is 0.
        """
        x = x.contiguous()
        output = torch.empty_like(x)
        self._activate(
            flat(x, torch.float32),
            output.data_ptr(),
            x.numel(),
            activation,
            torch.get_num_threads(),
        )
        return output
