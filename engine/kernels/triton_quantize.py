"""Rounding of rows before an 8-bit matrix product and scaling of its sums after it, on GPUs.

Both round as torch does on a CPU: `kernels.int8.quantize_rows` and `model.quantized_linear` define
the results. A program computes a row or a part of one, which does not depend on the other rows.

Compiled for GPUs and tested in Triton's interpreter; no size below has been measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # elements of a row that a program holds in registers
_TILE = 1024  # sums that a program scales

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Smaller scales are raised to this: as in torch, int8 bounds the scale, fp8 the magnitude.
_LEAST_SCALE = {torch.int8: 1e-30, torch.float8_e4m3fn: 1e-30 / 448}

# 1.5 * 2**23. Floats of this size have no fraction: adding and subtracting it rounds half to even.
_WHOLE = tl.constexpr(12582912.0)


def quantize_rows(dtype: torch.dtype, x: Tensor, min_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Rounds every row to 8 bits by its largest magnitude.

    Args:
        dtype: int8 or float8_e4m3fn.
        x: [num_rows, width]; fp32, bf16 or fp16.
        min_rows: the least number of rows of the result; those beyond num_rows are undefined.

    Returns:
        dtype [max(num_rows, min_rows), width]; fp32 [num_rows, 1], the scales. If a row is not
        finite, its scale is not finite either, and in float8 neither are its values.
    """
    num_rows, width = x.shape
    values = torch.empty(max(num_rows, min_rows), width, dtype=dtype, device=x.device)
    scales = torch.empty(num_rows, 1, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    round_row[(num_rows,)](
        values,
        scales,
        x.contiguous(),
        WIDTH=width,
        BLOCK=block,
        LARGEST=_LARGEST[dtype],
        LEAST_SCALE=_LEAST_SCALE[dtype],
        num_warps=min(max(block // 512, 4), 16),
    )
    return values, scales


def scale_sums(
    sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns sums * (row_scales * column_scales) + bias, rounded after the product and the sum.

    Args:
        sums: int32 [num_rows or more, width], contiguous.
        row_scales: fp32 [num_rows, 1].
        column_scales: fp32 [1, width].
        bias: [width].
        dtype: of the result, [num_rows, width].
    """
    num_rows, width = len(row_scales), sums.shape[1]
    output = torch.empty(num_rows, width, dtype=dtype, device=sums.device)
    scale_row[(num_rows, triton.cdiv(width, _TILE))](
        output,
        sums,
        row_scales,
        column_scales,
        bias,
        WIDTH=width,
        TILE=_TILE,
        num_warps=4,
        enable_fp_fusion=False,  # the product is rounded before the bias is added
    )
    return output


@triton.jit
def round_row(
    values,
    scales,
    x,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
):
    """Rounds one row. It is read twice, the second time from the second-level cache."""
    row = tl.program_id(0).to(tl.int64)
    source = x + row * WIDTH
    target = values + row * WIDTH
    lanes = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.int32)
    for first in range(0, WIDTH, BLOCK):
        states = tl.load(source + first + lanes, mask=first + lanes < WIDTH, other=0.0)
        # Without the sign, floats are in the order of their bits, and NaN is the largest.
        bits = states.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tops = tl.maximum(tops, bits)
    scale = tl.div_rn(tl.max(tops, 0).to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale)  # keeps NaN
    tl.store(scales + row, scale)
    for first in range(0, WIDTH, BLOCK):
        mask = first + lanes < WIDTH
        states = tl.load(source + first + lanes, mask=mask, other=0.0).to(tl.float32)
        # The quotient may exceed LARGEST, but by so little that it is rounded down to it.
        states = tl.div_rn(states, scale)
        if values.dtype.element_ty == tl.int8:
            states = (states + _WHOLE) - _WHOLE
        tl.store(target + first + lanes, states.to(values.dtype.element_ty), mask=mask)


@triton.jit
def scale_row(
    output, sums, row_scales, column_scales, bias, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Scales a tile of one row; the product is rounded before the bias is added."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = lanes < WIDTH
    scales = tl.load(row_scales + row) * tl.load(column_scales + lanes, mask=mask, other=0.0)
    states = tl.load(sums + row * WIDTH + lanes, mask=mask, other=0).to(tl.float32) * scales
    states = states.to(output.dtype.element_ty)
    if bias is not None:
        states = states.to(tl.float32) + tl.load(bias + lanes, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + lanes, states.to(output.dtype.element_ty), mask=mask)
