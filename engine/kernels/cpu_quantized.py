"""Linear layers with weights of 8 or 4 bits, by C kernels, and how these are laid out."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .addresses import expert_ends
from .cpu_library import CpuLibrary
from .kernel import INT, POINTER, SIZE, Kernel


class Int8Weight(NamedTuple):
    """An int8 weight [N, K] and a bias, laid out for `int8_linear`.

    N is rounded up to whole panels everywhere. `packed` is int8 [panels, K / 4, width, 4]; `scales`
    and `bias` are fp32 [panels * width]; `columns` is int32 [panels * width], the sums over K of
    each output's levels.
    """

    packed: Tensor
    scales: Tensor
    columns: Tensor
    bias: Tensor


class GroupedInt8Weight(NamedTuple):
    """An int8 weight [N, K] in groups of 32 and a bias, laid out for `grouped_int8_linear`.

    N is rounded up to whole panels everywhere. `packed` is int8 [panels, K / 4, width, 4];
    `scales` is [panels, K / 32, width], in float16 with `has_float16` and otherwise in fp32; `bias`
    is fp32 [panels * width].
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor


class Int4Weight(NamedTuple):
    """An int4 weight [N, K] and a bias, laid out for `int4_linear`.

    N is rounded up to whole panels everywhere. `packed` is uint8 [panels, K / 8, width, 4];
    `groups` is int32 [panels, K / group, width], the bits of a bfloat16 scale and, above them, of a
    bfloat16 least value; `bias` is fp32 [panels * width].
    """

    packed: Tensor
    groups: Tensor
    bias: Tensor


class QuantizedKernels(CpuLibrary):
    """Products of rows that are rounded to 8 bits with weights of 8 or 4 bits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._int8_linear = self._kernel(
            "int8_linear", *[POINTER] * 6, SIZE, SIZE, SIZE, POINTER, SIZE, INT
        )
        self._grouped_int8_linear = self._kernel(
            "grouped_int8_linear", *[POINTER] * 5, SIZE, SIZE, SIZE, POINTER, SIZE, INT
        )
        self._int4_linear = self._kernel(
            "int4_linear", *[POINTER] * 5, SIZE, SIZE, SIZE, SIZE, POINTER, SIZE, INT
        )

    def int8_linear(
        self, x: Tensor, weight: Int8Weight, out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """Return x [..., K] times the weight, plus its bias: fp32 [..., N].

        A row of x is rounded to 8 bits, scaled by its own largest magnitude. A row of the result
        does not depend on the other rows, bit for bit; it is NaN if the row of x is not finite.

        Args:
            x: fp32.
            weight: of a layer, or of the same layer of several experts, one after the other.
            out_features: N.
            ends: of experts, as of `linear`.
        """
        in_features = x.shape[-1]
        if -(-in_features // 4) != weight.packed.shape[1]:
            raise ValueError(f"expected fp32 input of width {4 * weight.packed.shape[1]}")
        return self._rounded(self._int8_linear, x, weight, (out_features, in_features), ends)

    def grouped_int8_linear(
        self, x: Tensor, weight: GroupedInt8Weight, out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """As `int8_linear`."""
        shape = out_features, 4 * weight.packed.shape[1]
        return self._rounded(self._grouped_int8_linear, x, weight, shape, ends)

    def int4_linear(
        self, x: Tensor, weight: Int4Weight, out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """As `int8_linear`."""
        in_features = 8 * weight.packed.shape[1]
        group_size = in_features // weight.groups.shape[1]
        shape = out_features, in_features
        return self._rounded(self._int4_linear, x, weight, shape, ends, group_size)

    def _rounded(
        self,
        kernel: Kernel,
        x: Tensor,
        weight: tuple[Tensor, ...],
        shape: tuple[int, int],
        ends: Tensor | None,
        *group_size: int,
    ) -> Tensor:
        """Call a kernel that rounds rows of x to 8 bits, for a weight of `shape`, N and K."""
        out_features, in_features = shape
        if x.dtype != torch.float32 or x.shape[-1] != in_features:
            raise ValueError(f"expected fp32 input of width {in_features}")
        x = x.contiguous()
        output = self._empty_rows(x, out_features)
        kernel(
            x.data_ptr(),
            *(part.data_ptr() for part in weight),
            output.data_ptr(),
            x.numel() // in_features,
            out_features,
            in_features,
            *group_size,
            *expert_ends(ends),
            torch.get_num_threads(),
        )
        return output
