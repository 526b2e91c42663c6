"""Low-rank updates of linear layers on GPUs, a different one for each row.

Rows are sorted by the slot of their update, and a program computes some rows of one slot, with that
slot's matrices alone. It reads their addresses from a table, so a recorded step serves updates that
come later. The sums of a row do not depend on the other rows.

Compiled for GPUs and tested in Triton's interpreter; no size below has been measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_tiles import RANK_STEP, TILE_ROWS, RowTiles

_DEPTH = 128  # inputs that a program multiplies at a time
_SPLIT = 1024  # inputs of a program: more programs than tiles read the matrices of few rows
_COLUMNS = 128  # outputs of a program


def add_updates(
    x: Tensor, y: Tensor, rows: RowTiles, table: Tensor, parts: Tensor, max_columns: int, rank: int
) -> None:
    """Adds to each row of y the update in its slot, times the same row of x; in place.

    Args:
        x: [num_rows, K] with contiguous rows; fp32, bf16 or fp16, and so are y and all matrices.
        y: [num_rows, N] with contiguous rows.
        rows: by their slots; rows without one are not touched.
        table: int64 [num_parts, num_slots, 3]: of each update the addresses of `down` [rank, K] and
            of `up` [outputs of the part, rank], multiples of 16, and the rank, a multiple of
            `RANK_STEP`; 0 where there is none.
        parts: int64 [num_parts, 2]: the first output of each part, and how many it has.
        max_columns: outputs of the largest part.
        rank: the largest that any update of the layer may have.
    """
    (num_rows, depth), num_tiles = x.shape, len(rows.tiles)
    if not num_tiles:
        return
    num_parts, num_slots, _ = table.shape
    splits = triton.cdiv(depth, _SPLIT)
    inner = torch.empty(num_parts, splits, num_rows, rank, device=x.device)
    shrink_rows[(num_tiles, splits, num_parts)](
        inner,
        x,
        table,
        rows.order,
        rows.tiles,
        num_rows,
        num_slots,
        x.stride(0),
        depth,
        rank,
        SPLITS=splits,
        SPLIT=_SPLIT,
        ROWS=TILE_ROWS,
        RANKS=RANK_STEP,
        DEPTH=_DEPTH,
        num_warps=4,
    )
    expand_rows[(num_tiles, triton.cdiv(max_columns, _COLUMNS), num_parts)](
        y,
        inner,
        table,
        parts,
        rows.order,
        rows.tiles,
        num_rows,
        num_slots,
        y.stride(0),
        rank,
        SPLITS=splits,
        ROWS=TILE_ROWS,
        RANKS=RANK_STEP,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


# The number of rows changes from step to step, and must not make Triton compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def shrink_rows(
    inner,
    x,
    table,
    order,
    tiles,
    num_rows,
    num_slots,
    x_stride,
    depth,
    capacity,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """inner[part, split, row, :rank] = a split of x[row] times `down`; rows in their order."""
    tile, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles + tile * 3)
    size = tl.load(tiles + tile * 3 + 1)
    entry = table + (part * num_slots + tl.load(tiles + tile * 3 + 2)) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if size > 0 and rank > 0:
        down = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
        lanes = tl.arange(0, ROWS)
        is_row = lanes < size
        rows = tl.load(order + first + lanes, mask=is_row, other=0)
        begin = split * SPLIT
        end = min(begin + SPLIT, depth)
        results = (part * SPLITS + split).to(tl.int64) * num_rows + first + lanes
        for base in range(0, rank, RANKS):
            ranks = base + tl.arange(0, RANKS)
            sums = tl.zeros((ROWS, RANKS), tl.float32)
            for start in range(begin, end, DEPTH):
                places = start + tl.arange(0, DEPTH)
                is_place = places < end
                inputs = tl.load(
                    x + rows[:, None] * x_stride + places[None, :],
                    mask=is_row[:, None] & is_place[None, :],
                    other=0.0,
                )
                weights = tl.load(
                    down + ranks[None, :].to(tl.int64) * depth + places[:, None],
                    mask=is_place[:, None],
                    other=0.0,
                )
                sums += tl.dot(inputs, weights, input_precision="ieee")
            target = inner + results[:, None] * capacity + ranks[None, :]
            tl.store(target, sums, mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def expand_rows(
    y,
    inner,
    table,
    parts,
    order,
    tiles,
    num_rows,
    num_slots,
    y_stride,
    capacity,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[row, outputs of the part] += the sum of inner[part, :, row] times `up`.

    As in the model, the inner sums are rounded to the format of the matrices.
    """
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles + tile * 3)
    size = tl.load(tiles + tile * 3 + 1)
    entry = table + (part * num_slots + tl.load(tiles + tile * 3 + 2)) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    width = tl.load(parts + part * 2 + 1)
    if size > 0 and rank > 0 and block * COLUMNS < width:
        up = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
        lanes = tl.arange(0, ROWS)
        is_row = lanes < size
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < width
        stride = rank // RANKS * RANKS  # tells the compiler that rows begin at multiples of it
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for base in range(0, rank, RANKS):
            ranks = base + tl.arange(0, RANKS)
            states = tl.zeros((ROWS, RANKS), tl.float32)
            for split in tl.static_range(SPLITS):
                results = (part * SPLITS + split).to(tl.int64) * num_rows + first + lanes
                states += tl.load(
                    inner + results[:, None] * capacity + ranks[None, :],
                    mask=is_row[:, None],
                    other=0.0,
                )
            weights = tl.load(
                up + columns[None, :].to(tl.int64) * stride + ranks[:, None],
                mask=is_column[None, :],
                other=0.0,
            )
            sums += tl.dot(states.to(weights.dtype), weights, input_precision="ieee")
        rows = tl.load(order + first + lanes, mask=is_row, other=0)
        outputs = tl.load(parts + part * 2) + columns
        target = y + rows[:, None] * y_stride + outputs[None, :]
        mask = is_row[:, None] & is_column[None, :]
        before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (before + sums).to(y.dtype.element_ty), mask=mask)
