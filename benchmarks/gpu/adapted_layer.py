"""A layer with random updates of several adapters, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.adapters.adapter import LowRankUpdate
from engine.adapters.low_rank import AdaptedRows, AddUpdates, Place, TorchUpdates
from engine.adapters.segmented_updates import Capacity, SegmentedUpdates

_SLOTS = 8
_RANKS = (16, 16, 8, 64)  # of the adapters in the first slots


class AdaptedLayer:
    """The updates of a layer of several parts, by the Triton kernel and by torch.

    The layer itself gives what it is told to: only its updates are computed.

    Args:
        parts: the outputs of each.
        in_features: of the layer.
        dtype: of the updates.
        device: where they are.
        ranks: of the adapters in the first slots.
    """

    def __init__(
        self,
        parts: Sequence[int],
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Sequence[int] = _RANKS,
    ) -> None:
        self.width = sum(parts)
        self._ranks = ranks
        like = torch.empty(0, dtype=dtype, device=device)
        places = [Place(sum(parts[:i]), n, in_features) for i, n in enumerate(parts)]
        self.in_triton = SegmentedUpdates(like, _SLOTS, places, Capacity())
        self.in_torch = TorchUpdates(like, _SLOTS, places)
        generator = torch.Generator().manual_seed(1)
        for slot, rank in enumerate(ranks):
            for index, place in enumerate(places):
                down = torch.randn(rank, place.in_features, generator=generator)
                up = torch.randn(place.out_features, rank, generator=generator)
                update = LowRankUpdate(down / place.in_features**0.5, up / rank**0.5)
                for updates in (self.in_triton, self.in_torch):
                    part = updates.parts[index]
                    packed = part.pack(update)
                    part.reserve(len(packed[0]))
                    part.put(slot, packed)

    def slots(self, rows: int, *, is_mixed: bool) -> Tensor:
        """A slot for each row; every third has none if they are mixed."""
        given = [row % len(self._ranks) for row in range(rows)]
        if is_mixed:
            given = [-1 if row % 3 == 0 else slot for row, slot in enumerate(given)]
        return torch.tensor(given)

    def updated(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """The rows of y with their updates, by the kernel; y stays as it is."""
        return _add(self.in_triton, x, y, slots)

    def expected(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """The same by torch."""
        return _add(self.in_torch, x, y, slots)


def _add(updates: AddUpdates, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    return updates(_Given(y), x, AdaptedRows(len(x), None, slots.to(x.device)))


class _Given(nn.Module):
    """A layer whose outputs are known."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self._y = y

    def forward(self, _: Tensor) -> Tensor:
        """Returns a copy of them."""
        return self._y.clone()
