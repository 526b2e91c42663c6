"""Sampling on GPUs: choosing and truncating, for which torch needs many passes or a sort.

`choose` cuts rows into slices of a fixed size, whose results are merged. `truncate` has a program
for each row, which finds the smallest kept score by bisection: of the whole row, until few scores
are left, and then of a copy of these. In both a row's result does not depend on the other rows.

Compiled for GPUs and tested in Triton's interpreter; no size below has been measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLICE = 4096  # scores that a program of `slice_peaks` reads
_BLOCK = 16384  # scores that a program of `truncate_rows` holds in registers
_FEW_LEFT = 4096  # scores that are copied; reading them again costs little

_NO_INDEX = tl.constexpr(2**31 - 1)
_FEW = tl.constexpr(32)  # scores that hold most of the mass of nearly any distribution
_LEAST_EXPONENT = tl.constexpr(-87.0)  # of a score's weight: smaller ones count as 0


def choose(scores: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns a token for every row, its log-probability, the row's maximum and its norm.

    See `CpuKernels.choose`, which has the same arguments and results.

    Raises:
        ValueError: the scores are not fp32 with contiguous rows.
    """
    rows, width = _checked(scores)
    logprobs, maxima, norms = (scores.new_empty(rows) for _ in range(3))
    ids = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if not rows:
        return ids, logprobs, maxima, norms
    num_slices = triton.cdiv(width, _SLICE)
    peaks = scores.new_empty(rows, 2, num_slices)  # maximum and sum of a slice
    peak_columns = torch.empty(rows, num_slices, dtype=torch.int32, device=scores.device)
    slice_peaks[(rows, num_slices)](
        peaks,
        peak_columns,
        scores,
        scores.stride(0),
        num_slices,
        WIDTH=width,
        SLICE=_SLICE,
        num_warps=8,
    )
    choose_rows[(rows,)](
        ids,
        logprobs,
        maxima,
        norms,
        peaks,
        peak_columns,
        scores,
        ids if draws is None else draws,
        scores.stride(0),
        num_slices,
        WIDTH=width,
        SLICE=_SLICE,
        LANES=triton.next_power_of_2(num_slices),
        DRAWS=draws is not None,
        num_warps=8,
    )
    return ids, logprobs, maxima, norms


def truncate(scores: Tensor, limits: Tensor) -> None:
    """Divides rows by their temperatures and sets the scores of dropped tokens to -inf, in place.

    See `CpuKernels.truncate`, which takes the same arguments. `limits` must be contiguous.

    Raises:
        ValueError: the scores are not fp32 with contiguous rows.
    """
    rows, width = _checked(scores)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        few = min(_FEW_LEFT, block)
        copies = scores.new_empty(rows, few)
        truncate_rows[(rows,)](
            scores,
            limits,
            copies,
            scores.stride(0),
            rows,
            WIDTH=width,
            BLOCK=block,
            FEW=few,
            num_warps=16,
        )


def _checked(scores: Tensor) -> tuple[int, int]:
    rows, width = scores.shape
    if scores.dtype != torch.float32 or scores.stride(1) != 1 or not width:
        raise ValueError("expected fp32 scores with contiguous rows")
    return rows, width


@triton.jit(do_not_specialize=["row_stride"])
def slice_peaks(
    peaks,
    peak_columns,
    scores,
    row_stride,
    num_slices,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The maximum of a slice, the sum of exp(score - maximum), and the index of the maximum."""
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
    column = tl.min(tl.where((x == top) & is_score, columns, _NO_INDEX), 0)
    nan_column = tl.min(tl.where(is_nan, columns, _NO_INDEX), 0)
    has_nan = nan_column != _NO_INDEX
    target = peaks + row * 2 * num_slices + part
    tl.store(target, tl.where(has_nan, float("nan"), top))
    tl.store(target + num_slices, total)
    tl.store(peak_columns + row * num_slices + part, tl.where(has_nan, nan_column, column))


@triton.jit(do_not_specialize=["row_stride"])
def choose_rows(
    ids,
    logprobs,
    maxima,
    norms,
    peaks,
    peak_columns,
    scores,
    draws,
    row_stride,
    num_slices,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    LANES: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """Merges the slices of a row and chooses its token."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    is_slice = lanes < num_slices
    minus_infinity = float("-inf")
    source = peaks + row * 2 * num_slices + lanes
    tops = tl.load(source, mask=is_slice, other=minus_infinity)
    sums = tl.load(source + num_slices, mask=is_slice, other=0.0)
    columns = tl.load(peak_columns + row * num_slices + lanes, mask=is_slice, other=_NO_INDEX)
    is_nan = tops != tops
    top = tl.max(tl.where(is_nan, minus_infinity, tops), 0)
    nan_column = tl.min(tl.where(is_nan, columns, _NO_INDEX), 0)
    column = tl.min(tl.where((tops == top) & is_slice, columns, _NO_INDEX), 0)
    has_nan = nan_column != _NO_INDEX
    is_finite = (tl.abs(top) < float("inf")) & (nan_column == _NO_INDEX)
    differences = tl.where(is_finite, tops - tl.where(is_finite, top, 0.0), minus_infinity)
    masses = sums * tl.exp(differences)
    total = tl.where(is_finite, tl.sum(masses, 0), 1.0)
    token = tl.where(has_nan, nan_column, column)
    row_start = scores + row * row_stride
    if DRAWS:
        draw = tl.load(draws + row)
        if (draw >= 0) & is_finite:
            token = _drawn(row_start, masses, top, draw, WIDTH, SLICE, LANES)
    # As in torch, where infinity minus infinity is NaN.
    norm = tl.where(is_finite, tl.log(total), float("nan"))
    maximum = tl.where(has_nan, float("nan"), top)
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(row_start + token) - maximum - norm)
    tl.store(maxima + row, maximum)
    tl.store(norms + row, norm)


@triton.jit
def _drawn(
    row_start, masses, top, draw, WIDTH: tl.constexpr, SLICE: tl.constexpr, LANES: tl.constexpr
):
    """The first token at which the cumulative probability exceeds the draw.

    First the slice is found, then the token in it. If rounding keeps the sums below the goal, it is
    the last token with a weight above 0.
    """
    lanes = tl.arange(0, LANES)
    masses = masses.to(tl.float64)
    goal = tl.sum(masses, 0) * draw
    is_beyond = (tl.cumsum(masses, 0) > goal) & (masses > 0)
    last = tl.max(tl.where(masses > 0, lanes, 0), 0)
    part = tl.minimum(tl.min(tl.where(is_beyond, lanes, LANES), 0), last)
    left = (goal - tl.sum(tl.where(lanes < part, masses, 0.0), 0)).to(tl.float32)
    offsets = tl.arange(0, SLICE)
    columns = part * SLICE + offsets
    x = tl.load(row_start + columns, mask=columns < WIDTH, other=float("-inf"))
    weights = tl.exp(x - top)
    is_beyond = (tl.cumsum(weights, 0) > left) & (weights > 0)
    last = tl.max(tl.where(weights > 0, offsets, 0), 0)
    return part * SLICE + tl.minimum(tl.min(tl.where(is_beyond, offsets, SLICE), 0), last)


@triton.jit(do_not_specialize=["row_stride", "num_rows"])
def truncate_rows(
    scores,
    limits,
    copies,
    row_stride,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Truncates one row. It is read several times, from the second-level cache after the first."""
    row = tl.program_id(0).to(tl.int64)
    x = scores + row * row_stride
    copy = copies + row * FEW
    temperature = tl.load(limits + row)
    top_k = tl.load(limits + num_rows + row)
    top_p = tl.load(limits + 2 * num_rows + row)
    typical_p = tl.load(limits + 3 * num_rows + row)
    lane_tops = tl.full([BLOCK], float("-inf"), tl.float32)
    bottom = float("inf")
    num_nans = 0
    num_finite = 0
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        is_score = columns < WIDTH
        score = tl.load(x + columns, mask=is_score, other=float("-inf"))
        score = tl.div_rn(score, temperature)
        tl.store(x + columns, score, mask=is_score)
        num_nans += tl.sum((score != score).to(tl.int32), 0)
        score = tl.where(score == score, score, float("-inf"))
        is_there = score > float("-inf")
        num_finite += tl.sum(is_there.to(tl.int32), 0)
        bottom = tl.minimum(bottom, tl.min(tl.where(is_there, score, float("inf")), 0))
        lane_tops = tl.maximum(lane_tops, score)
    tl.debug_barrier()  # threads read what other threads have written
    top = tl.max(lane_tops, 0)
    is_usual = (num_nans == 0) & (tl.abs(top) < float("inf"))
    above = top + tl.abs(top) * 1e-6 + 1e-6  # larger than all scores
    if is_usual & ((top_k < WIDTH) | (top_p < 1.0)):
        low = bottom
        high = bottom
        left = 0.0
        if top_k < num_finite:
            low = _edge_of_count(x, copy, lane_tops, bottom, above, top_k, WIDTH, BLOCK, FEW)
            high = low
        if top_p < 1.0:
            low, high, left = _edge_of_mass(
                x, copy, lane_tops, low, above, top, top_p, WIDTH, BLOCK, FEW
            )
        _keep(x, low, above, high, above, left, top, WIDTH, BLOCK)
        tl.debug_barrier()
    if is_usual & (typical_p < 1.0):
        centre = top + _mean_difference(x, top, WIDTH, BLOCK)
        far, near, left = _edges_around(x, copy, centre, above, top, typical_p, WIDTH, BLOCK, FEW)
        _keep(x, centre - far, centre + far, centre - near, centre + near, left, top, WIDTH, BLOCK)


@triton.jit
def _middle(low, high):
    """The number halfway; equal to one of them if there is none in between."""
    return low * 0.5 + high * 0.5  # the difference may be infinite


@triton.jit
def _kth_largest(numbers, low, high, k):
    """Nearly the largest threshold that k numbers reach; `low` if fewer than k reach that."""
    middle = _middle(low, high)
    count = tl.sum((numbers >= low).to(tl.int32), 0)
    while (count > k) & (middle > low) & (middle < high):
        num_above = tl.sum((numbers >= middle).to(tl.int32), 0)
        is_enough = num_above >= k
        low = tl.where(is_enough, middle, low)
        count = tl.where(is_enough, num_above, count)
        high = tl.where(is_enough, high, middle)
        middle = _middle(low, high)
    return low


@triton.jit
def _edge_of_count(
    x,
    copy,
    lane_tops,
    low,
    high,
    wanted,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """A threshold that only the k largest scores reach, and those that equal the last of them."""
    k = tl.maximum(wanted, 1.0).to(tl.int32)
    # Each lane has the maximum of many scores: if k lanes reach a threshold, so do k scores.
    low = _kth_largest(lane_tops, low, high, k)
    count, _ = _weigh(x, low, high, high, WIDTH, BLOCK)
    low, high, k, count = _narrow_count(x, low, high, k, count, FEW, WIDTH, BLOCK)
    if (count > k) & (count <= FEW):
        _copy_window(copy, x, low, high, high, high, WIDTH, BLOCK, FEW)
        low, high, k, count = _narrow_count(copy, low, high, k, count, 0, FEW, FEW)
    return low


@triton.jit
def _narrow_count(x, low, high, k, count, most, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Narrows a window [low, high) around the k-th largest of its scores, of which it has `count`.

    It ends when `most` scores or fewer are left, only the k largest, or no number lies between the
    edges.
    """
    middle = _middle(low, high)
    while (count > k) & (count > most) & (middle > low) & (middle < high):
        num_above, _ = _weigh(x, middle, high, high, WIDTH, BLOCK)
        # Scores of `high` or more are not in this count.
        is_enough = num_above >= k
        low = tl.where(is_enough, middle, low)
        count = tl.where(is_enough, num_above, count - num_above)
        k = tl.where(is_enough, k, k - num_above)
        high = tl.where(is_enough, high, middle)
        middle = _middle(low, high)
    return low, high, k, count


@triton.jit
def _edge_of_mass(
    x,
    copy,
    lane_tops,
    least,
    high,
    top,
    share,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """A window [low, high) around the smallest score that top-p keeps.

    Returns:
        The window, and the mass that scores in it must still contribute to the share.
    """
    low = tl.maximum(least, top + _LEAST_EXPONENT)
    count, mass = _weigh(x, low, high, top, WIDTH, BLOCK)
    left = mass * share  # of the goal, to be held by scores below `high`
    middle = _kth_largest(lane_tops, low, high, _FEW)  # the largest few may hold most of it
    middle = tl.where(middle > low, middle, _middle(low, high))
    low, high, left, count = _narrow_mass(x, low, high, middle, left, count, FEW, top, WIDTH, BLOCK)
    if (count > 1) & (count <= FEW):
        _copy_window(copy, x, low, high, high, high, WIDTH, BLOCK, FEW)
        middle = _middle(low, high)
        low, high, left, count = _narrow_mass(
            copy, low, high, middle, left, count, 1, top, FEW, FEW
        )
    return low, high, left


@triton.jit
def _narrow_mass(
    x, low, high, middle, left, count, most, top, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Narrows a window [low, high), of `count` scores, around the score at which `left` is reached.

    `left` is the mass that its largest scores hold; `middle` is tried first. It ends when `most`
    scores or fewer are left, or no number lies between the edges.
    """
    while (count > most) & (middle > low) & (middle < high):
        num_above, mass_above = _weigh(x, middle, high, top, WIDTH, BLOCK)
        is_enough = mass_above >= left
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        count = tl.where(is_enough, num_above, count - num_above)
        left = tl.where(is_enough, left, left - mass_above)
        middle = _middle(low, high)
    return low, high, left, count


@triton.jit
def _mean_difference(x, top, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of score - top under the scores' own distribution."""
    masses = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        score = tl.load(x + columns, mask=columns < WIDTH, other=float("-inf"))
        weights = tl.exp(score - top)
        masses += weights
        moments += tl.where(weights > 0, weights * (score - top), 0.0)
    return tl.sum(moments, 0) / tl.sum(masses, 0)


@triton.jit
def _edges_around(
    x,
    copy,
    centre,
    above,
    top,
    share,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """The distances from the centre between which the farthest score lies that typical-p keeps.

    Windows are [centre - distance, centre + distance).

    Returns:
        The larger distance `far`, the smaller one `near`, and the mass that scores between them
        must still contribute to the share.
    """
    near = tl.full((), 0.0, tl.float32)
    far = tl.maximum(above - centre, centre - top - _LEAST_EXPONENT)
    count, mass = _weigh(x, centre - far, centre + far, top, WIDTH, BLOCK)
    left = mass * share
    near, far, left, count = _narrow_ring(x, centre, near, far, left, count, FEW, top, WIDTH, BLOCK)
    if (count > 1) & (count <= FEW):
        low, high = centre - far, centre + far
        _copy_window(copy, x, low, high, centre - near, centre + near, WIDTH, BLOCK, FEW)
        near, far, left, count = _narrow_ring(
            copy, centre, near, far, left, count, 1, top, FEW, FEW
        )
    return far, near, left


@triton.jit
def _narrow_ring(
    x, centre, near, far, left, count, most, top, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Narrows the distances between which the score lies at which `left` is reached.

    `left` is the mass that those of the `count` scores between them hold that are nearest. It ends
    when `most` scores or fewer are left, or the edges are as near as rounding lets them be.
    """
    goal = left
    count_near = 0
    middle = (near + far) * 0.5
    while (count - count_near > most) & (centre - middle < centre - near) & (middle < far):
        num_within, mass_within = _weigh(x, centre - middle, centre + middle, top, WIDTH, BLOCK)
        is_enough = mass_within >= goal
        far = tl.where(is_enough, middle, far)
        count = tl.where(is_enough, num_within, count)
        near = tl.where(is_enough, near, middle)
        count_near = tl.where(is_enough, count_near, num_within)
        left = tl.where(is_enough, left, goal - mass_within)
        middle = (near + far) * 0.5
    return near, far, left, count - count_near


@triton.jit
def _copy_window(
    copy,
    x,
    low,
    high,
    sure_low,
    sure_high,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Copies the scores in [low, high) outside of [sure_low, sure_high), which are FEW at most."""
    num_copied = 0
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        score = tl.load(x + columns, mask=columns < WIDTH, other=float("-inf"))
        is_in = (score >= low) & (score < high) & ((score < sure_low) | (score >= sure_high))
        places = num_copied + tl.cumsum(is_in.to(tl.int32), 0) - 1
        tl.store(copy + places, score, mask=is_in)
        num_copied += tl.sum(is_in.to(tl.int32), 0)
    lanes = tl.arange(0, FEW)
    tl.store(copy + lanes, float("-inf"), mask=lanes >= num_copied)
    tl.debug_barrier()  # threads read what other threads have written


@triton.jit
def _weigh(x, low, high, top, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores are in [low, high), and the sum of exp(score - top) over them."""
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        score = tl.load(x + columns, mask=columns < WIDTH, other=float("-inf"))
        is_in = (score >= low) & (score < high)
        counts += is_in.to(tl.int32)
        masses += tl.where(is_in, tl.exp(score - top), 0.0)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _keep(x, low, high, sure_low, sure_high, left, top, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sets scores outside of [low, high) to -inf.

    Scores in [sure_low, sure_high) are kept; of the others the first, up to a mass of `left`.
    """
    used = 0.0
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        score = tl.load(x + columns, mask=columns < WIDTH, other=float("-inf"))
        is_in = (score >= low) & (score < high)
        is_edge = is_in & ((score < sure_low) | (score >= sure_high))
        masses = tl.where(is_edge, tl.exp(score - top), 0.0)
        before = used + tl.cumsum(masses, 0) - masses
        is_out = ((score < low) | (score >= high)) | (is_edge & (before >= left))
        tl.store(x + columns, float("-inf"), mask=is_out & (columns < WIDTH))
        used += tl.sum(masses, 0)
