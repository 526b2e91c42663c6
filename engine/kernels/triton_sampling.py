"""What choosing tokens asks of rows of scores, on GPUs: one pass over the vocabulary.

Torch needs four passes and writes the scores anew in one of them. A row is cut into slices of a
fixed size, which are then merged: its result does not depend on the rows beside it.

Compiled for GPUs and tested in Triton's interpreter; the sizes below are unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLICE = 4096  # scores of a program

_NO_INDEX = tl.constexpr(2**31 - 1)


def row_statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the maximum of each row, where it stands first, and the log-sum-exp above it.

    Args:
        scores: fp32 [rows, V] with contiguous rows, V at least 1.

    Returns:
        fp32 [rows]; int64 [rows]; fp32 [rows]. A row with a NaN has it for its maximum, found at
        the first NaN; where the maximum is NaN or infinite, the last is NaN.

    Raises:
        ValueError: other scores.
    """
    rows, width = scores.shape
    if scores.dtype != torch.float32 or scores.stride(1) != 1 or not width:
        raise ValueError("expected fp32 scores with contiguous rows")
    maxima, norms = scores.new_empty(rows), scores.new_empty(rows)
    argmax = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if not rows:
        return maxima, argmax, norms
    num_slices = triton.cdiv(width, _SLICE)
    peaks = scores.new_empty(rows, 2, num_slices)  # maximum and sum of a slice
    places = torch.empty(rows, num_slices, dtype=torch.int32, device=scores.device)
    slice_peaks[(rows, num_slices)](
        peaks, places, scores, scores.stride(0), num_slices, WIDTH=width, SLICE=_SLICE, num_warps=8
    )
    merge_peaks[(rows,)](
        maxima,
        argmax,
        norms,
        peaks,
        places,
        num_slices,
        LANES=triton.next_power_of_2(num_slices),
        num_warps=1,
    )
    return maxima, argmax, norms


@triton.jit(do_not_specialize=["row_stride"])
def slice_peaks(
    peaks,
    places,
    scores,
    row_stride,
    num_slices,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The maximum of a slice, the sum of exp(score - maximum), and where the maximum stands."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * SLICE + tl.arange(0, SLICE)
    is_score = columns < WIDTH
    minus_infinity = float("-inf")
    x = tl.load(scores + row * row_stride + columns, mask=is_score, other=minus_infinity)
    is_nan = x != x
    top = tl.max(tl.where(is_nan, minus_infinity, x), 0)
    is_finite = tl.abs(top) < float("inf")
    differences = tl.where(is_finite, x - tl.where(is_finite, top, 0.0), minus_infinity)
    total = tl.sum(tl.exp(differences), 0)
    place = tl.min(tl.where((x == top) & is_score, columns, _NO_INDEX), 0)
    nan_place = tl.min(tl.where(is_nan, columns, _NO_INDEX), 0)
    has_nan = nan_place != _NO_INDEX
    target = peaks + row * 2 * num_slices + part
    tl.store(target, tl.where(has_nan, float("nan"), top))
    tl.store(target + num_slices, total)
    tl.store(places + row * num_slices + part, tl.where(has_nan, nan_place, place))


@triton.jit
def merge_peaks(maxima, argmax, norms, peaks, places, num_slices, LANES: tl.constexpr):
    """One row out of its slices."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    is_slice = lanes < num_slices
    minus_infinity = float("-inf")
    source = peaks + row * 2 * num_slices + lanes
    tops = tl.load(source, mask=is_slice, other=minus_infinity)
    sums = tl.load(source + num_slices, mask=is_slice, other=0.0)
    columns = tl.load(places + row * num_slices + lanes, mask=is_slice, other=_NO_INDEX)
    is_nan = tops != tops
    top = tl.max(tl.where(is_nan, minus_infinity, tops), 0)
    nan_column = tl.min(tl.where(is_nan, columns, _NO_INDEX), 0)
    column = tl.min(tl.where((tops == top) & is_slice, columns, _NO_INDEX), 0)
    has_nan = nan_column != _NO_INDEX
    is_finite = (tl.abs(top) < float("inf")) & (nan_column == _NO_INDEX)
    differences = tl.where(is_finite, tops - tl.where(is_finite, top, 0.0), minus_infinity)
    total = tl.where(is_finite, tl.sum(sums * tl.exp(differences), 0), 1.0)
    tl.store(maxima + row, tl.where(has_nan, float("nan"), top))
    tl.store(argmax + row, tl.where(has_nan, nan_column, column).to(tl.int64))
    # Infinity minus infinity is a NaN in torch.
    tl.store(norms + row, tl.where(is_finite, tl.log(total), float("nan")))
