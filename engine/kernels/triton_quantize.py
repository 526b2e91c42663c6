"""What lies around products of 8 bits, on GPUs: rows are rounded before, sums scaled after.

Both round as torch does on a CPU: `kernels.int8.quantize_rows` and `quantized_linear` have the
definitions. A program has a row or a part of one: its result does not depend on the other rows.

Compiled for GPUs and tested in Triton's interpreter; the sizes below are unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # elements of a row that a program has in its registers
_TILE = 1024  # sums that a program scales

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Rows of smaller magnitude count as zeros: int8 has the bound after the division, fp8 before.
_LEAST_SCALE = {torch.int8: 1e-30, torch.float8_e4m3fn: 1e-30 / 448}

# 1.5 * 2**23. Numbers that far up have no fractions: added and taken off, it rounds half to even.
_WHOLE = tl.constexpr(12582912.0)


def quantize_rows(dtype: torch.dtype, x: Tensor, min_rows: int = 0) -> tuple[Tensor, Tensor]:
    """Rounds every row to 8 bits by its largest magnitude.

    Args:
        dtype: int8 or float8_e4m3fn.
        x: [num_rows, width]; fp32, bf16 or fp16.
        min_rows: how many rows there shall be at least; those beyond num_rows hold anything.

    Returns:
        dtype [max(num_rows, min_rows), width]; fp32 [num_rows, 1], the scales. A row that is not
        finite has a scale that is not finite, and in float8 values that are not.
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
    """Returns sums * (row_scales * column_scales), and then plus bias, rounded after either.

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
        enable_fp_fusion=False,  # a product and the bias are rounded one after the other
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
    """Rounds one row, which is read twice: it stays in the second-level cache."""
    row = tl.program_id(0).to(tl.int64)
    source = x + row * WIDTH
    target = values + row * WIDTH
    lanes = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], tl.int32)
    for first in range(0, WIDTH, BLOCK):
        states = tl.load(source + first + lanes, mask=first + lanes < WIDTH, other=0.0)
        # Without their signs, numbers are in the order of their bits, and NaN is the largest.
        bits = states.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tops = tl.maximum(tops, bits)
    scale = tl.div_rn(tl.max(tops, 0).to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale)  # which leaves NaN
    tl.store(scales + row, scale)
    for first in range(0, WIDTH, BLOCK):
        mask = first + lanes < WIDTH
        states = tl.load(source + first + lanes, mask=mask, other=0.0).to(tl.float32)
        # The quotient may be above LARGEST, but only by so little that it is rounded down to it.
        states = tl.div_rn(states, scale)
        if values.dtype.element_ty == tl.int8:
            states = (states + _WHOLE) - _WHOLE
        tl.store(target + first + lanes, states.to(values.dtype.element_ty), mask=mask)


@triton.jit
def scale_row(
    output, sums, row_scales, column_scales, bias, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Scales a tile of one row; what that gives is rounded before the bias is added."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = lanes < WIDTH
    scales = tl.load(row_scales + row) * tl.load(column_scales + lanes, mask=mask, other=0.0)
    states = tl.load(sums + row * WIDTH + lanes, mask=mask, other=0).to(tl.float32) * scales
    states = states.to(output.dtype.element_ty)
    if bias is not None:
        states = states.to(tl.float32) + tl.load(bias + lanes, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + lanes, states.to(output.dtype.element_ty), mask=mask)
