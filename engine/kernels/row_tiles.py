"""Rows of a step sorted by what they are multiplied with, in tiles of rows that share it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 16  # the fewest that tensor cores multiply
RANK_STEP = 16  # ranks are padded to a multiple of it, likewise


class RowTiles(NamedTuple):
    """The rows of a step that have a slot, sorted by it, in tiles of rows of one slot.

    There are as many tiles as rows and slots of these numbers can need: a recorded step computes
    them anew for other slots. `order` int64 [num_rows]: the rows; those without a slot come first.
    `tiles` int64 [num_tiles, 3]: of each tile the first of its rows in `order`, how many they are,
    at most `TILE_ROWS`, and their slot. A tile that is not needed has 0 rows.
    """

    order: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, slots: Tensor, num_slots: int) -> RowTiles:
        """The tiles of rows whose slots are int64 [num_rows], below 0 for none.

        Computed on the device, without waiting for it.
        """
        device, num_rows = slots.device, len(slots)
        order = torch.argsort(slots, stable=True)
        bounds = torch.searchsorted(slots[order], torch.arange(num_slots + 1, device=device))
        starts, ends = bounds[:-1], bounds[1:]
        num_tiles = (ends - starts + (TILE_ROWS - 1)) // TILE_ROWS
        until = num_tiles.cumsum(0)
        most = num_rows // TILE_ROWS + min(num_slots, num_rows)
        index = torch.arange(most, device=device)
        found = torch.searchsorted(until, index, right=True)
        slot = found.clamp(max=num_slots - 1)
        first = starts[slot] + (index - (until - num_tiles)[slot]) * TILE_ROWS
        size = torch.where(found < num_slots, ends[slot] - first, 0).clamp(0, TILE_ROWS)
        return cls(order, torch.stack([first, size, slot], dim=1))
