"""Low-rank updates of linear layers by C kernels: those of adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .addresses import flat
from .cpu_library import ALIGNMENT, CpuLibrary
from .formats import FORMATS, exact_dtype
from .kernel import INT, POINTER, SIZE

_RANKS = 4  # of an update that are next to each other, as in c/low_rank.h


class PackedUpdate(NamedTuple):
    """A low-rank update of a part of a layer, laid out for `add_updates`.

    `down` is [rank / 4, K / panel width, 4, panel width], its rank rounded up to whole vectors, and
    `up` [N / panel width, rank, panel width], both of one of `FORMATS`.
    """

    down: Tensor
    up: Tensor
    rank: int


class Updates:
    """The updates of a layer, by its parts and by slots.

    Args:
        parts: of each part the first output and the number of outputs.
        num_slots: of each part.
    """

    def __init__(self, parts: Sequence[tuple[int, int]], num_slots: int) -> None:
        """Begin with empty slots."""
        self._parts = torch.tensor(parts, dtype=torch.int64)
        self._table = torch.zeros(len(parts), num_slots, 4, dtype=torch.int64)
        self._held: dict[tuple[int, int], PackedUpdate] = {}

    def put(self, part: int, slot: int, update: PackedUpdate | None) -> None:
        """Fill a slot of a part, or empty it."""
        if update is None:
            self._table[part, slot] = 0
            self._held.pop((part, slot), None)
            return
        addresses = update.down.data_ptr(), update.up.data_ptr()
        entry = (*addresses, update.rank, FORMATS[update.down.dtype])
        self._table[part, slot] = torch.tensor(entry)
        self._held[part, slot] = update  # as long as its addresses are in the table

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """Their addresses and sizes, as the kernels take them; they stay the same."""
        num_parts, num_slots, _ = self._table.shape
        return self._table.data_ptr(), self._parts.data_ptr(), num_parts, num_slots


class LowRankKernels(CpuLibrary):
    """Updates packed, and added to the results of layers by the slots of rows."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._add_updates = self._kernel(
            "add_updates", POINTER, POINTER, SIZE, *[POINTER] * 3, *[SIZE] * 5, INT
        )
        self._adapted_linear = self._kernel("adapted_linear", *[POINTER] * 7, *[SIZE] * 5, INT, INT)

    def pack_update(self, down: Tensor, up: Tensor) -> PackedUpdate:
        """Return an update up @ down, fp32 [N, rank] and [rank, K], for `add_updates`.

        It takes half of the memory, and of the time to read it, if 16 bits hold all its numbers.
        May be called from any thread.
        """
        if down.dtype != torch.float32 or up.dtype != torch.float32:
            raise ValueError("expected fp32 matrices")
        dtype = exact_dtype((down, up))
        up_panels = _panels(up.to(dtype), self.panel_width)
        down_groups = self._rank_groups(down.to(dtype))
        if dtype == torch.bfloat16:
            up_panels, down_groups = _paired(up_panels), _paired(down_groups)
        return PackedUpdate(down_groups, up_panels, len(down))

    def _rank_groups(self, down: Tensor) -> Tensor:
        """A matrix [rank, K] as [rank / 4, K / width, 4, width], padded with zeros."""
        missing = -down.shape[1] % self.panel_width, -len(down) % self.vector_width
        padded = torch.nn.functional.pad(down, (0, missing[0], 0, missing[1]))
        blocks = padded.view(-1, _RANKS, padded.shape[1] // self.panel_width, self.panel_width)
        return blocks.transpose(1, 2).contiguous()

    def together(self, updates: Sequence[PackedUpdate]) -> list[PackedUpdate]:
        """Copy updates next to each other, on huge pages where they are large enough for these.

        So they are read with fewer TLB misses, and the memory is free when all of them are.
        """
        matrices = [matrix for update in updates for matrix in (update.down, update.up)]
        sizes = [-(-matrix.nbytes // ALIGNMENT) * ALIGNMENT for matrix in matrices]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self.advise_huge_pages(memory)
        copies = [
            piece[: matrix.nbytes].view(matrix.dtype).view(matrix.shape).copy_(matrix)
            for piece, matrix in zip(torch.split(memory, sizes), matrices, strict=True)
        ]
        pairs = zip(copies[::2], copies[1::2], updates, strict=True)
        return [PackedUpdate(down, up, update.rank) for down, up, update in pairs]

    def add_updates(self, x: Tensor, y: Tensor, slots: Tensor, updates: Updates) -> None:
        """Add to each row of y the updates in its slot, times the same row of x; in place.

        A row of the result does not depend on the other rows, bit for bit.

        Args:
            x: fp32 [rows, K].
            y: fp32 [rows, N], with contiguous rows.
            slots: int64 [rows], of the updates; rows with a slot below 0 are not touched.
            updates: read anew in each replay.

        Raises:
            IndexError: there is no such slot.
        """
        rows, in_features = x.shape
        if y.shape[0] != rows or y.stride(1) != 1 or y.dtype != torch.float32:
            raise ValueError(f"expected {rows} fp32 rows to update")
        if slots.numel() != rows:
            raise ValueError("expected a slot for each row")
        self._add_updates(
            flat(x, torch.float32),
            y.data_ptr(),
            y.stride(0),
            flat(slots, torch.int64),
            *updates.arguments,
            rows,
            y.shape[1],
            in_features,
            torch.get_num_threads(),
        )

    def adapted_linear(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        slots: Tensor,
        updates: Updates,
    ) -> Tensor:
        """Return `linear` of x [..., K] with `add_updates` to its rows, bit for bit, by one call.

        Threads are woken once.

        Raises:
            IndexError: there is no such slot.
        """
        if x.dtype != torch.float32 or x.shape[-1] != packed.shape[1]:
            raise ValueError(f"expected fp32 input of width {packed.shape[1]}")
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        if slots.numel() != rows:
            raise ValueError("expected a slot for each row")
        output = self._empty_rows(x, out_features)
        self._adapted_linear(
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            flat(slots, torch.int64),
            *updates.arguments,
            rows,
            out_features,
            x.shape[-1],
            FORMATS[packed.dtype],
            torch.get_num_threads(),
        )
        return output


def _panels(matrix: Tensor, width: int) -> Tensor:
    """A matrix [N, K] as [N / width rounded up, K, width], padded with zeros."""
    missing = -len(matrix) % width
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, missing))
    return padded.view(-1, width, matrix.shape[1]).transpose(1, 2).contiguous()


def _paired(panels: Tensor) -> Tensor:
    """Panels [..., width] of bfloat16 in the order of `pack_weight`: their halves, interleaved."""
    halves = panels.view(*panels.shape[:-1], 2, -1)
    return halves.transpose(-1, -2).reshape(panels.shape)
