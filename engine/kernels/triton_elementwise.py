"""RMS norms, also of a sum, and the gates of MLPs on GPUs, in one kernel each.

They round where transformers rounds, so that a model's tokens do not change. Block sizes depend on
the width of a row alone: a row's result does not depend on the number of rows.

Compiled for GPUs and tested in Triton's interpreter; no size below has been measured on a GPU.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
MAX_WIDTH = 16_384  # of a row that is normalised: a program holds it in registers

_NORM_ELEMENTS = 1024  # the fewest that a program normalises: rows of one head are narrow
_GATE_TILE = 1024

_LOG2_E = tl.constexpr(1.4426950408889634)
_GELU_CUBE = tl.constexpr(0.044715)
_GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(y)) / 2 = sigmoid(2 y)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, weight_offset: float, rounds_early: bool
) -> Tensor:
    """Returns x / rms(x) * (weight_offset + weight) over the last dimension, computed in fp32.

    Args:
        x: [..., width]; fp32, bf16 or fp16, and so is the result.
        weight: [width].
        epsilon: added to the mean of the squares.
        weight_offset: added to the weight.
        rounds_early: whether x / rms(x) is rounded to the format of x before it is multiplied.

    Raises:
        ValueError: the rows are too wide.
    """
    width = x.shape[-1]
    if width > MAX_WIDTH or weight.shape != (width,):
        raise ValueError(f"rows of {width} do not fit")
    inner, distance = max(x.numel() // width, 1), 0
    output = torch.empty_like(x)
    if _has_dense_groups(x):  # heads of one part of a merged product
        inner, distance = x.shape[-2], x.stride(-3)
        output = x.new_empty(x.shape)
    elif x.stride(-1) != 1 or output.stride() != x.stride():  # rows are not dense in memory
        x = x.contiguous()
        output = torch.empty_like(x)
    _normalise(output, x, weight, epsilon, inner, distance, weight_offset, rounds_early)
    return output


def add_rms_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    weight_offset: float,
    rounds_early: bool,
) -> tuple[Tensor, Tensor]:
    """Returns x + update, rounded to the format of x, and the `rms_norm` of that sum.

    Args:
        x: [..., width]; fp32, bf16 or fp16, and so are the results.
        update: like x.
        weight: [width].
        epsilon: see `rms_norm`.
        weight_offset: see `rms_norm`.
        rounds_early: see `rms_norm`.

    Raises:
        ValueError: the rows are too wide, or the two tensors differ in shape or dtype.
    """
    width = x.shape[-1]
    if width > MAX_WIDTH or weight.shape != (width,):
        raise ValueError(f"rows of {width} do not fit")
    if x.shape != update.shape or x.dtype != update.dtype:
        raise ValueError(f"{x.dtype} {[*x.shape]} and {update.dtype} {[*update.shape]} differ")
    x, update = x.contiguous(), update.contiguous()
    total, output = torch.empty_like(x), torch.empty_like(x)
    inner = max(x.numel() // width, 1)
    added = (update, total)
    _normalise(output, x, weight, epsilon, inner, 0, weight_offset, rounds_early, added)
    return total, output


def _normalise(
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    inner: int,
    distance: int,
    weight_offset: float,
    rounds_early: bool,
    added: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launches the kernel; `added` are what is added to x, and where the sum goes."""
    width = x.shape[-1]
    num_rows = x.numel() // width
    lanes = triton.next_power_of_2(width)
    rows = max(1, _NORM_ELEMENTS // lanes)
    update, total = added or (x, x)
    norm_rows[(triton.cdiv(num_rows, rows),)](
        output,
        x,
        update,
        total,
        weight,
        epsilon,
        num_rows,
        inner,
        distance,
        WIDTH=width,
        LANES=lanes,
        ROWS=rows,
        WEIGHT_OFFSET=weight_offset,
        ROUNDS_EARLY=rounds_early,
        ADDS=added is not None,
        num_warps=min(max(lanes // 512, 4), 16),
    )


def _has_dense_groups(x: Tensor) -> bool:
    """Whether x is [1, ..., groups, rows, width] with gaps only between its groups of rows."""
    if x.dim() < 3 or x.is_contiguous() or math.prod(x.shape[:-3]) != 1:
        return False
    return x.stride()[-2:] == (x.shape[-1], 1) and x.stride(-3) >= x.shape[-2] * x.shape[-1]


def gated(merged: Tensor, *, activation: Activation) -> Tensor:
    """Returns activation(gate) * up, where merged [..., 2 * width] is gate and up side by side."""
    merged = merged.contiguous()
    width = merged.shape[-1] // 2
    output = merged.new_empty(*merged.shape[:-1], width)
    gate_rows[(output.numel() // width, triton.cdiv(width, _GATE_TILE))](
        output,
        merged,
        WIDTH=width,
        TILE=_GATE_TILE,
        IS_GELU=activation == "gelu_tanh",
        num_warps=4,
    )
    return output


# The number of rows changes from step to step, and must not make Triton compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "inner"])
def norm_rows(
    output,
    x,
    update,
    total,
    weight,
    epsilon,
    num_rows,
    inner,
    distance,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUNDS_EARLY: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Normalises ROWS rows. In memory `inner` of them follow each other, every `distance` elements.

    Those of the output all follow each other. With ADDS so do all rows, and what is normalised is
    the sum of two, which is stored as well.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    is_lane = lanes < WIDTH
    mask = (rows < num_rows)[:, None] & is_lane[None, :]
    elements = rows[:, None] * WIDTH + lanes[None, :]
    starts = rows // inner * distance + rows % inner * WIDTH
    sources = x + starts[:, None] + lanes[None, :]
    states = tl.load(sources, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        states += tl.load(update + elements, mask=mask, other=0.0).to(tl.float32)
        rounded = states.to(output.dtype.element_ty)
        tl.store(total + elements, rounded, mask=mask)
        states = rounded.to(tl.float32)
    scales = tl.rsqrt(tl.sum(states * states, 1) / WIDTH + epsilon)
    states = states * scales[:, None]
    if ROUNDS_EARLY:
        states = states.to(output.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + lanes, mask=is_lane, other=0.0).to(tl.float32) + WEIGHT_OFFSET
    states = states * weights[None, :]
    tl.store(output + elements, states.to(output.dtype.element_ty), mask=mask)


@triton.jit
def gate_rows(output, merged, WIDTH: tl.constexpr, TILE: tl.constexpr, IS_GELU: tl.constexpr):
    """Computes a tile of one row; the activation's result is rounded before it is multiplied."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = lanes < WIDTH
    source = merged + row * (2 * WIDTH) + lanes
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    argument = gate
    if IS_GELU:
        argument = (gate + gate * gate * gate * _GELU_CUBE) * _GELU_SCALE
    activated = gate / (1.0 + tl.exp2(argument * -_LOG2_E))
    activated = activated.to(output.dtype.element_ty).to(tl.float32)
    target = output + row * WIDTH + lanes
    tl.store(target, (activated * up).to(output.dtype.element_ty), mask=mask)
