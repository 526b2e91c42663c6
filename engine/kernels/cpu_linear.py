"""Linear layers by a C kernel, and weights packed for it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .addresses import expert_ends
from .cpu_library import CpuLibrary
from .formats import FORMATS, PAIRS
from .kernel import INT, POINTER, SIZE


class LinearKernels(CpuLibrary):
    """Products with packed weights of fp32 or 16 bits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._linear = self._kernel(
            "linear", *[POINTER] * 4, SIZE, SIZE, SIZE, INT, POINTER, SIZE, INT
        )
        self._pack_weight = self._function(
            "pack_weight", None, POINTER, SIZE, SIZE, SIZE, POINTER, INT, INT
        )

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Return weight [N, K] as panels [N / width rounded up, K, width].

        Args:
            weight: fp32; bfloat16; or, with `has_float16`, float16. The panels have its dtype, in
                an order of the columns of a panel that depends on it.
        """
        out_features, in_features = weight.shape
        panels = -(-out_features // self.panel_width)
        if weight.dtype not in FORMATS or weight.device.type != "cpu":
            raise ValueError("only fp32, bfloat16 and float16 weights on the CPU can be packed")
        if weight.dtype == torch.float16 and not self.has_float16:
            raise ValueError("this processor does not widen float16")
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        packed = self.empty_weight((panels, in_features, self.panel_width), weight.dtype)
        self._pack_weight(
            weight.data_ptr(),
            weight.stride(0),
            out_features,
            in_features,
            packed.data_ptr(),
            FORMATS[weight.dtype],
            torch.get_num_threads(),
        )
        return packed

    def pack_pairs(self, weight: Tensor) -> Tensor:
        """Return weight [N, K] for `pair_linear`, rounded to bfloat16.

        The panels are int32 [N / width rounded up, K / 2 rounded up, width]: an item has two steps
        of K.
        """
        rounded = weight.detach().to(torch.bfloat16)
        rounded = torch.nn.functional.pad(rounded, (0, rounded.shape[1] % 2)).contiguous()
        return self.pack_weight(rounded.view(torch.float32)).view(torch.int32)

    def pair_linear(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        """Return x [..., K] times a weight that `pack_pairs` made, plus bias: fp32 [..., N].

        Numbers of x are rounded to bfloat16; products are added up in fp32. A row of the result
        does not depend on the other rows of x, bit for bit.
        """
        if packed.dtype != torch.int32 or (x.shape[-1] + 1) // 2 != packed.shape[1]:
            raise ValueError(f"expected input of width {2 * packed.shape[1]}, and pairs")
        return self._multiplied(x, packed, PAIRS, bias, out_features)

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Return x [..., K] times the packed weight, plus bias: fp32 [..., N].

        A row of the result does not depend on the other rows of x, bit for bit, and is the same
        for a weight of 16 bits as for the same weight in fp32.

        Args:
            x: fp32.
            packed: of a layer, or of the same layer of several experts, one after the other, each
                padded to whole panels, as their biases are.
            bias: fp32.
            out_features: N.
            ends: of experts, int64 [num_experts]: the rows of x before each that the experts
                before have not are this one's. The last is the number of rows.
        """
        if x.shape[-1] != packed.shape[1]:
            raise ValueError(f"expected input of width {packed.shape[1]}")
        return self._multiplied(x, packed, FORMATS[packed.dtype], bias, out_features, ends)

    def _multiplied(
        self,
        x: Tensor,
        packed: Tensor,
        form: int,
        bias: Tensor | None,
        out_features: int,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Input times a packed weight of a format."""
        if x.dtype != torch.float32:
            raise ValueError("expected fp32 input")
        x = x.contiguous()
        in_features = x.shape[-1]
        output = self._empty_rows(x, out_features)
        self._linear(
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            x.numel() // in_features,
            out_features,
            in_features,
            form,
            *expert_ends(ends),
            torch.get_num_threads(),
        )
        return output
