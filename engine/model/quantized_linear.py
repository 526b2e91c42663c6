"""Linear layers over quantised weights whose matrix products torch has, on CPU and GPU.

They know how weights and activations are rounded, not which layers of a model they replace. All
three are tested on the CPU; none has been run on a GPU yet. `kernels/int8.py` and `kernels/int4.py`
have layers that are faster than `Int8Linear` and `Int4Linear` on the CPU. On a GPU with Triton,
rounding the input of an 8-bit product and scaling its sums is one kernel each instead of torch's
many; results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import has_triton
from ..kernels.int4 import SMALL_GROUP_SIZE, group_weight
from ..kernels.int8 import MAX_IN_FEATURES, quantize_rows
from ..kernels.packed_linear import output_rows

_FLOAT8 = torch.float8_e4m3fn
_MAX_FLOAT8 = torch.finfo(_FLOAT8).max
_LEAST = 1e-30  # magnitudes below count as zeros
_INT8_ROWS = 32  # torch._int_mm needs more than 16 on a GPU
_INNER_K_TILES = 8  # of the GPU's weight layout; K has to be a multiple of 16 times this


class QuantizedLinear(nn.Module):
    """The base of the layers: sizes, the bias, and flattening of leading dimensions to rows."""

    def __init__(self, linear: nn.Module) -> None:
        """Take over the sizes and the bias of a layer."""
        super().__init__()
        self.out_features, self.in_features = output_rows(linear).shape
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        self.bias = None if bias is None else nn.Buffer(bias.detach().clone(), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """Quantise the weight of a layer; the layer itself is left as it is."""
        return cls(linear)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether torch multiplies a weight [N, K] of this shape, on the device it is on."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., K] times the weight, plus bias: [..., N] in the format of x."""
        rows = x.reshape(-1, self.in_features).contiguous()
        if not len(rows):  # not all of torch's products accept an input without rows
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._multiply(rows).view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        """Return rows [num_rows, K] times the weight, plus bias, in the format of the rows."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class Int8Linear(QuantizedLinear):
    """W8A8 in int8: exact integer sums, a scale per output channel and per input row."""

    def __init__(self, linear: nn.Module) -> None:
        """Quantise a layer."""
        super().__init__(linear)
        weight = output_rows(linear).detach()
        levels, scales = _row_ops(weight.device.type).to_int8(weight, 0)
        self.levels = nn.Buffer(levels, persistent=False)  # int8 [N, K]
        self.scales = nn.Buffer(scales.t().contiguous(), persistent=False)  # fp32 [1, N]

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether torch multiplies a weight of this shape."""
        out_features, in_features = weight.shape
        return out_features % 8 == 0 and in_features % 8 == 0 and in_features <= MAX_IN_FEATURES

    def _multiply(self, rows: Tensor) -> Tensor:
        ops = _row_ops(rows.device.type)
        levels, scales = ops.to_int8(rows, _INT8_ROWS)
        sums = torch._int_mm(levels, self.levels.t())
        return ops.scale(sums, scales, self.scales, self.bias, rows.dtype)


class Int4Linear(QuantizedLinear):
    """Weight-only, 4 bits, in the groups of `kernels/int4.py`.

    Products are in bfloat16, whatever the model's dtype: on a GPU torch has no others, on the CPU
    those of float32 are a hundred times slower.
    """

    def __init__(self, linear: nn.Module) -> None:
        """Quantise a layer."""
        super().__init__(linear)
        weight = output_rows(linear).detach()
        groups = group_weight(weight)
        self.group_size = self.in_features // groups.scales.shape[1]
        # torch reads a weight as (level - 8) * scale + offset; [K / group, N, 2] of them
        pairs = torch.stack([groups.scales, groups.least + 8 * groups.scales], dim=-1)
        self.levels = nn.Buffer(_pack_int4(groups.levels), persistent=False)
        self.scales = nn.Buffer(pairs.transpose(0, 1).contiguous().bfloat16(), persistent=False)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether torch multiplies a weight of this shape, on the device it is on."""
        out_features, in_features = weight.shape
        depth = 16 * _INNER_K_TILES if weight.is_cuda else SMALL_GROUP_SIZE
        return out_features % 16 == 0 and in_features % depth == 0

    def _multiply(self, rows: Tensor) -> Tensor:
        aten = torch.ops.aten
        multiply = aten._weight_int4pack_mm if rows.is_cuda else aten._weight_int4pack_mm_for_cpu
        product = multiply(rows.bfloat16(), self.levels, self.group_size, self.scales)
        assert isinstance(product, Tensor)
        return _finish(product, self.bias, rows.dtype)


class Fp8Linear(QuantizedLinear):
    """W8A8 in float8 (e4m3), for Ada and Hopper: a scale per output channel and per input row."""

    def __init__(self, linear: nn.Module) -> None:
        """Quantise a layer."""
        super().__init__(linear)
        weight = output_rows(linear).detach()
        values, scales = _row_ops(weight.device.type).to_float8(weight)
        self.values = nn.Buffer(values, persistent=False)  # float8 [N, K]
        self.scales = nn.Buffer(scales.t().contiguous(), persistent=False)  # fp32 [1, N]

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether torch multiplies a weight of this shape."""
        return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0

    def _multiply(self, rows: Tensor) -> Tensor:
        values, scales = _row_ops(rows.device.type).to_float8(rows)
        # With scales per row, bfloat16 is the only output dtype. The product could add a bfloat16
        # bias as well, and round once instead of twice if the GPU's library does.
        product = torch._scaled_mm(
            values, self.values.t(), scales, self.scales, out_dtype=torch.bfloat16
        )
        return _finish(product, self.bias, rows.dtype)


class _RowOps(NamedTuple):
    """The operations before and after a product of 8 bits.

    Attributes:
        to_int8: rounds rows [num_rows, K] to levels and scales [num_rows, 1]. The second argument
            is the least number of rows of the levels; the content of added rows is undefined.
        to_float8: rounds rows to values and scales.
        scale: turns the product's sums into the layer's output, from the scales of rows and
            columns, the bias and the output's dtype.
    """

    to_int8: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    to_float8: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


@cache
def _row_ops(device: str) -> _RowOps:
    """The operations on a type of device: in Triton where it is installed, otherwise in torch."""
    if device == "cpu" or not has_triton():
        return _RowOps(_int8_rows, _float8_rows, _scaled)
    from ..kernels.triton_quantize import quantize_rows as in_triton
    from ..kernels.triton_quantize import scale_sums

    return _RowOps(partial(in_triton, torch.int8), partial(in_triton, _FLOAT8), scale_sums)


def _int8_rows(x: Tensor, min_rows: int) -> tuple[Tensor, Tensor]:
    levels, scales = quantize_rows(x)
    missing = max(0, min_rows - len(x))
    return (F.pad(levels, (0, 0, 0, missing)) if missing else levels), scales


def _float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 [rows, K] and fp32 scales [rows, 1]; a row that is not finite becomes NaN."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=_LEAST) / _MAX_FLOAT8
    return (x / scales).clamp(-_MAX_FLOAT8, _MAX_FLOAT8).to(_FLOAT8), scales


def _scaled(
    sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    sums = sums[: len(row_scales)]
    return _finish(sums.float() * (row_scales * column_scales), bias, dtype)


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y.to(dtype)
    return y if bias is None else y + bias


def _pack_int4(levels: Tensor) -> Tensor:
    """Packs levels into the layout of torch's kernel for the device."""
    aten = torch.ops.aten
    if levels.is_cuda:
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        packed = aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
    else:
        packed = aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    assert isinstance(packed, Tensor)
    return packed
