"""Updates on a GPU, each row multiplied with the matrices of its own adapter alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels import has_triton
from ..kernels.row_tiles import RANK_STEP
from .adapter import LowRankUpdate
from .low_rank import AdaptedRows, Packed, Part, Place, TorchUpdates

logger = logging.getLogger(__name__)

_LEAST_CAPACITY = 64  # ranks that a recorded step has room for, whatever was loaded before


class Capacity:
    """The largest rank that a model's layers have room for between their two products.

    A recorded step has as much room as there was when it was recorded.
    """

    def __init__(self) -> None:
        self.rank = _LEAST_CAPACITY

    def grow(self, rank: int) -> None:
        """Makes room for updates of a rank."""
        self.rank = max(self.rank, rank)


class SegmentedUpdates:
    """By a Triton kernel that reads the addresses of a slot's matrices in every call.

    Args:
        like: of the dtype and on the device of the model.
        num_slots: of each part.
        places: the parts.
        capacity: of all layers of the model.
    """

    def __init__(
        self, like: Tensor, num_slots: int, places: Sequence[Place], capacity: Capacity
    ) -> None:
        self._capacity = capacity
        self._num_slots = num_slots
        self._max_columns = max(place.out_features for place in places)
        self._table = like.new_zeros(len(places), num_slots, 3, dtype=torch.int64)
        bounds = [(place.first, place.out_features) for place in places]
        self._bounds = torch.tensor(bounds, device=like.device)
        self.parts: Sequence[Part] = [
            _SegmentedPart(like, self._table[index], place, capacity)
            for index, place in enumerate(places)
        ]

    def __call__(self, layer: nn.Module, x: Tensor, adapted: AdaptedRows) -> Tensor:
        """See AddUpdates; `adapted` has a slot for every token."""
        from ..kernels.triton_low_rank import add_updates

        result: Tensor = layer(x)
        rows = result.reshape(-1, result.shape[-1])
        add_updates(
            x.reshape(-1, x.shape[-1]).contiguous(),
            rows,
            adapted.tiles(self._num_slots),
            self._table,
            self._bounds,
            self._max_columns,
            self._capacity.rank,
        )
        return rows.view_as(result)


class _SegmentedPart:
    """The matrices of all slots, and the entries of the table that say where they are.

    A slot's memory is that of the largest rank so far; `down` and `up` of smaller ones lie at its
    begin. So an adapter that is put into a slot takes no more memory. Ranks are multiples of
    `RANK_STEP`, and so all matrices begin at multiples of 16 bytes.
    """

    def __init__(self, like: Tensor, table: Tensor, place: Place, capacity: Capacity) -> None:
        self.first = place.first
        self.out_features = place.out_features
        self.in_features = place.in_features
        self._table = table
        self._capacity = capacity
        self._down = like.new_empty(len(table), 0)  # [num_slots, rank * in]
        self._up = like.new_empty(len(table), 0)  # [num_slots, out * rank]
        self._ranks = [0] * len(table)

    def pack(self, update: LowRankUpdate) -> Packed:
        """See Part. Ranks are padded with zeros."""
        missing = -len(update.down) % RANK_STEP
        dtype = self._down.dtype
        down = nn.functional.pad(update.down.to(dtype), (0, 0, 0, missing))
        up = nn.functional.pad(update.up.to(dtype), (0, missing))
        return LowRankUpdate(down.contiguous(), up.contiguous())

    def reserve(self, rank: int) -> None:
        """See Part."""
        if rank * self.in_features <= self._down.shape[1]:
            return
        num_slots = len(self._ranks)
        down = self._down.new_empty(num_slots, rank * self.in_features)
        up = self._up.new_empty(num_slots, self.out_features * rank)
        down[:, : self._down.shape[1]] = self._down
        up[:, : self._up.shape[1]] = self._up
        self._down, self._up = down, up
        self._capacity.grow(rank)
        for slot, before in enumerate(self._ranks):
            self._tell(slot, before)

    def put(self, slot: int, packed: Packed | None) -> None:
        """See Part."""
        if packed is None:
            self._tell(slot, 0)
            return
        assert isinstance(packed, LowRankUpdate)
        for memory, matrix in ((self._down, packed.down), (self._up, packed.up)):
            memory[slot, : matrix.numel()].copy_(matrix.flatten())
        self._tell(slot, len(packed.down))

    def _tell(self, slot: int, rank: int) -> None:
        self._ranks[slot] = rank
        entry = (self._down[slot].data_ptr(), self._up[slot].data_ptr(), rank)
        self._table[slot] = torch.tensor(entry if rank else (0, 0, 0))


@torch.no_grad()
def segmented_agrees(like: Tensor) -> bool:
    """Whether the kernel runs on this device and computes what torch does. Logs why not."""
    if not has_triton():
        return False
    places = [Place(0, 40, 64), Place(40, 24, 64)]
    both = (SegmentedUpdates(like, 3, places, Capacity()), TorchUpdates(like, 3, places))
    generator = torch.Generator().manual_seed(0)
    for slot, rank in enumerate((5, 20)):
        for index, place in enumerate(places):
            down = torch.randn(rank, place.in_features, generator=generator) / 8
            up = torch.randn(place.out_features, rank, generator=generator) / rank**0.5
            for updates in both:
                part = updates.parts[index]
                packed = part.pack(LowRankUpdate(down, up))
                part.reserve(len(packed[0]))
                part.put(slot, packed)
    slots = torch.tensor([0, 1, -1, 1, 2], device=like.device)
    x = torch.randn(5, 64, generator=generator).to(like)
    layer = nn.Linear(64, 64, bias=False).to(like)
    try:
        ours, expected = (u(layer, x, AdaptedRows(5, None, slots)).float() for u in both)
    except torch.AcceleratorError:  # the device cannot be used any more
        raise
    except Exception as error:  # for example no working compiler
        logger.warning("updates of adapters are computed by torch: %s", error)
        return False
    difference = float((ours - expected).abs().max() / expected.abs().max())
    if not difference <= 8 * torch.finfo(like.dtype).eps:
        logger.warning("updates of adapters are computed by torch: off by %.2e", difference)
        return False
    return True
