"""A linear layer with the updates of adapters beside it, each adapter's in a slot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels.cpu import CpuKernels
from ..kernels.cpu_low_rank import PackedUpdate, Updates
from ..kernels.packed_linear import PackedLinear
from ..kernels.row_tiles import RowTiles
from .adapter import LowRankUpdate

NO_SLOT = -1


@dataclass(slots=True)
class AdaptedRows:
    """The rows of a step that have an adapter.

    Attributes:
        num_tokens: of the step.
        rows: int64 [num_rows], which of them; None for all.
        slots: int64 [num_rows], that of each one's adapter; `NO_SLOT` for none.
        others: see `columns_of_others`.
        sorted: see `tiles`.
    """

    num_tokens: int
    rows: Tensor | None
    slots: Tensor
    others: dict[int, Tensor] = field(default_factory=dict)
    sorted: list[RowTiles] = field(default_factory=list)

    def tiles(self, num_slots: int) -> RowTiles:
        """The rows sorted by slot, for all layers of a step, where every token has a slot."""
        if not self.sorted:
            self.sorted.append(RowTiles.of(self.slots, num_slots))
        return self.sorted[0]

    def slots_of_all(self) -> Tensor:
        """Int64 [num_tokens]: the slot of each token."""
        if self.rows is None:
            return self.slots
        return self.slots.new_full((self.num_tokens,), NO_SLOT).index_copy_(
            0, self.rows, self.slots
        )

    def columns_of_others(self, num_slots: int, rank: int) -> Tensor:
        """Bool [num_rows, num_slots * rank]: the columns of slots that are not the row's own.

        Most layers have the same rank, so it is computed once in a step.
        """
        mask = self.others.get(rank)
        if mask is None:
            columns = torch.arange(num_slots, device=self.slots.device).repeat_interleave(rank)
            mask = self.others[rank] = columns.unsqueeze(0) != self.slots.unsqueeze(1)
        return mask


class Step:
    """The rows with adapters of the step that is being computed: one for a whole model."""

    def __init__(self) -> None:
        self.adapted: AdaptedRows | None = None

    @contextlib.contextmanager
    def selecting(self, rows: Tensor | slice) -> Iterator[None]:
        """While it lasts, layers get these of the step's rows, in this order, and no others."""
        whole = self.adapted
        if whole is not None:
            slots = whole.slots_of_all()[rows]
            self.adapted = AdaptedRows(len(slots), None, slots)
        try:
            yield
        finally:
            self.adapted = whole


Packed = PackedUpdate | LowRankUpdate


class Part(Protocol):
    """The outputs of a layer from `first` to `first + out_features`, which have their own updates.

    A layer has several parts if it was merged of several layers.
    """

    first: int
    out_features: int
    in_features: int

    def pack(self, update: LowRankUpdate) -> Packed:
        """The update as `put` takes it. May be called from any thread."""

    def reserve(self, rank: int) -> None:
        """Allocates what updates of this rank take."""

    def put(self, slot: int, packed: Packed | None) -> None:
        """Fills a slot, between two steps; None empties it."""


class AddUpdates(Protocol):
    """Computes a layer with the updates of its parts."""

    parts: Sequence[Part]

    def __call__(self, layer: nn.Module, x: Tensor, adapted: AdaptedRows) -> Tensor:
        """Return layer(x) [..., out] for x [..., in], with the updates of the rows' adapters."""


@dataclass(frozen=True, slots=True)
class Place:
    """The outputs that a part has, and the inputs of the layer."""

    first: int
    out_features: int
    in_features: int


class KernelUpdates:
    """By the C kernels, which multiply each row with the matrices of its own adapter alone.

    They read the addresses of the matrices in every call, so that recorded steps serve adapters
    that were loaded after them.
    """

    def __init__(self, kernels: CpuKernels, num_slots: int, places: Sequence[Place]) -> None:
        self._kernels = kernels
        self._updates = Updates([(place.first, place.out_features) for place in places], num_slots)
        self.parts: Sequence[Part] = [
            _KernelPart(kernels, self._updates, index, place) for index, place in enumerate(places)
        ]

    def __call__(self, layer: nn.Module, x: Tensor, adapted: AdaptedRows) -> Tensor:
        """See AddUpdates; `adapted` has a slot for every token."""
        if type(layer) is PackedLinear:
            return layer.adapted(x, adapted.slots, self._updates)
        result: Tensor = layer(x)
        rows = result.reshape(-1, result.shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).contiguous()
        self._kernels.add_updates(inputs, rows, adapted.slots, self._updates)
        return rows.view_as(result)


class _KernelPart:
    def __init__(self, kernels: CpuKernels, updates: Updates, index: int, place: Place) -> None:
        self.first = place.first
        self.out_features = place.out_features
        self.in_features = place.in_features
        self._kernels = kernels
        self._updates = updates
        self._index = index

    def pack(self, update: LowRankUpdate) -> Packed:
        return self._kernels.pack_update(update.down, update.up)

    def reserve(self, rank: int) -> None:
        """Nothing: a slot has addresses."""

    def put(self, slot: int, packed: Packed | None) -> None:
        assert not isinstance(packed, LowRankUpdate)
        self._updates.put(self._index, slot, packed)


class TorchUpdates:
    """By torch, on any device."""

    def __init__(self, like: Tensor, num_slots: int, places: Sequence[Place]) -> None:
        self._parts = [_TorchPart(like, num_slots, place) for place in places]
        self.parts: Sequence[Part] = self._parts

    def __call__(self, layer: nn.Module, x: Tensor, adapted: AdaptedRows) -> Tensor:
        """See AddUpdates."""
        result: Tensor = layer(x)
        rows = result.reshape(-1, result.shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        for part in self._parts:
            part.add(inputs, rows, adapted)
        return rows.view_as(result)


class _TorchPart:
    """The matrices of all slots, side by side.

    `down` is [slots * rank, in] and `up` [out, slots * rank], so that rows of any adapters are
    computed by the same two products. Between these, the columns of other slots are set to 0.
    """

    def __init__(self, like: Tensor, num_slots: int, place: Place) -> None:
        self.first = place.first
        self.out_features = place.out_features
        self.in_features = place.in_features
        self._num_slots = num_slots
        self._rank = 0  # of the largest update so far
        self._down = like.new_zeros(0, place.in_features)
        self._up = like.new_zeros(place.out_features, 0)
        self._filled: set[int] = set()

    def pack(self, update: LowRankUpdate) -> Packed:
        """See Part."""
        dtype = self._down.dtype
        return LowRankUpdate(update.down.to(dtype), update.up.to(dtype))

    def reserve(self, rank: int) -> None:
        """See Part."""
        if rank <= self._rank:
            return
        down = self._down.new_zeros(self._num_slots, rank, self.in_features)
        up = self._up.new_zeros(self.out_features, self._num_slots, rank)
        if self._rank:
            down[:, : self._rank] = self._down.view(self._num_slots, self._rank, -1)
            up[:, :, : self._rank] = self._up.view(-1, self._num_slots, self._rank)
        self._down, self._up, self._rank = down.flatten(0, 1), up.flatten(1), rank

    def put(self, slot: int, packed: Packed | None) -> None:
        """See Part."""
        if not self._rank:
            return
        columns = slice(slot * self._rank, (slot + 1) * self._rank)
        self._down[columns] = 0
        self._up[:, columns] = 0
        self._filled.discard(slot)
        if packed is not None:
            assert isinstance(packed, LowRankUpdate)
            used = slice(columns.start, columns.start + len(packed.down))
            self._down[used] = packed.down.to(self._down.device)
            self._up[:, used] = packed.up.to(self._up.device)
            self._filled.add(slot)

    def add(self, x: Tensor, y: Tensor, adapted: AdaptedRows) -> None:
        """Adds the updates of the rows x [tokens, in] to y [tokens, out], in place."""
        if not self._filled:
            return
        inputs = x if adapted.rows is None else x.index_select(0, adapted.rows)
        others = adapted.columns_of_others(self._num_slots, self._rank)
        delta = linear(linear(inputs, self._down).masked_fill_(others, 0.0), self._up)
        target = y[:, self.first : self.first + self.out_features]
        if adapted.rows is None:
            target.add_(delta)
        else:
            target.index_add_(0, adapted.rows, delta)


class AdaptedLinear(nn.Module):
    """A layer of any kind: y = layer(x), and for rows with an adapter also up(down(x))."""

    def __init__(self, layer: nn.Module, updates: AddUpdates, step: Step) -> None:
        """Take over a layer, with the parts of it that can be updated."""
        super().__init__()
        self.layer = layer
        self.updates = updates
        self.num_rows: list[int] = []  # of each call while it `watches`
        self.watches = False
        self._step = step

    @property
    def weight(self) -> Tensor:
        """The layer's own, for a model that reads it instead of calling the layer."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """See `weight`."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result for x [..., in], with the updates of the rows' adapters.

        Raises:
            RuntimeError: the rows of x are not the step's tokens.
        """
        adapted = self._step.adapted
        if self.watches:
            self.num_rows.append(x.numel() // x.shape[-1])
        if adapted is None or self.watches:
            result: Tensor = self.layer(x)
            return result
        if x.numel() != adapted.num_tokens * x.shape[-1]:
            raise RuntimeError(f"a layer got {[*x.shape]} for {adapted.num_tokens} tokens")
        return self.updates(self.layer, x, adapted)
