"""Puts a place for adapters beside every linear layer of a model that is ready to serve.

It comes last: the layers may be merged, packed or quantised by then, and their updates stay in the
model's own dtype. An update of a layer that was merged into another one is an update of its rows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.paged import ReferenceAttention
from ..kernels.cpu import CpuKernels
from ..kernels.cpu_low_rank import PackedUpdate
from ..kernels.packed_linear import output_rows
from ..model.experts import PackedExperts, PackedMatrix
from ..model.fusion import FusedMLP
from ..model.layers import parents_of_layers
from ..model.loaded import LoadedModel
from ..model.projections import ProjectionPart
from ..model.self_check import SELF_CHECK_TOKENS, one_step_logits
from ..protocol.errors import ModelLoadError, first_line
from ..shards.cut import Cut
from ..shards.layers import plain
from .adapter import Adapter, LowRankUpdate
from .low_rank import (
    AdaptedLinear,
    AdaptedRows,
    AddUpdates,
    KernelUpdates,
    Packed,
    Part,
    Place,
    Step,
    TorchUpdates,
)
from .segmented_updates import Capacity, SegmentedUpdates


@dataclass(frozen=True, slots=True)
class FittedAdapter:
    """An adapter as the model's layers take it.

    Attributes:
        digest: sha-256 of what it was read from, in hex.
        rank: the largest of its updates.
        updates: each with where it goes.
    """

    digest: str
    rank: int
    updates: tuple[tuple[Part, Packed], ...]


@dataclass(frozen=True, slots=True)
class _Site:
    """The name of a layer before any were merged, and where its outputs are now."""

    name: str
    layer: nn.Module
    place: Place


class AdaptedLayers:
    """A model's linear layers, each with slots for updates.

    Layers that the model does not call, since it reads their weight itself, or that it gives other
    rows than a step's tokens, as experts, stay as they are: their updates are refused. A rank has
    the parts of updates that belong to its parts of the layers.

    Args:
        loaded: the model, after all passes.
        num_slots: how many adapters can be on the device at a time.
        kernels: compute the updates on a CPU, if given.
        is_segmented: whether the Triton kernel computes them.
        rounds_to: a format that updates are rounded to first, if given.

    Attributes:
        step: what the layers read in each step.
        capacity: the ranks that a step has room for, by the Triton kernel; None without it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        num_slots: int,
        kernels: CpuKernels | None = None,
        *,
        is_segmented: bool = False,
        rounds_to: torch.dtype | None = None,
    ) -> None:
        self.step = Step()
        self.num_slots = num_slots
        self.capacity = Capacity() if is_segmented else None
        # `AdaptedRows` has a slot for every token
        self.needs_all_rows = kernels is not None or is_segmented
        self._loaded = loaded
        self._kernels = kernels
        self._rounds_to = rounds_to
        self._parts: dict[str, Part] = {}
        self._refused: dict[str, str] = {}
        self._slots: dict[int, FittedAdapter] = {}
        if loaded.recurrence is not None:  # its layers take a step apart
            loaded.recurrence.selecting = self.step.selecting
        self._wrap()

    def fit(self, adapter: Adapter) -> FittedAdapter:
        """What each layer takes of an adapter. May be called from any thread.

        Raises:
            ModelLoadError: it does not fit the model.
        """
        updates = self._together(
            [self._fit(adapter.name, name, update) for name, update in adapter.updates.items()]
        )
        rank = max((len(update.down) for update in adapter.updates.values()), default=0)
        return FittedAdapter(adapter.digest.hex(), rank, updates)

    @torch.inference_mode()
    def reserve(self, adapter: FittedAdapter) -> None:
        """Allocates what it takes on the device, for all slots.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        for part, packed in adapter.updates:
            part.reserve(packed.down.shape[0] if isinstance(packed, LowRankUpdate) else packed.rank)

    @torch.inference_mode()
    def put(self, slot: int, adapter: FittedAdapter | None) -> None:
        """Fills a slot, between two steps; None empties it."""
        before = self._slots.pop(slot, None)
        for part, _ in before.updates if before is not None else ():
            part.put(slot, None)
        if adapter is not None:
            self._slots[slot] = adapter
            for part, packed in adapter.updates:
                part.put(slot, packed)

    def check(self, name: str, slot: int) -> None:
        """Computes a text with the adapter in a slot.

        Raises:
            ModelLoadError: the logits are not numbers, or there are none.
        """
        try:
            logits = self._logits(slot)
        except Exception as error:
            raise ModelLoadError(
                f"adapter {name} does not run on this model: {first_line(error)}"
            ) from error
        if not torch.isfinite(logits).all():
            raise ModelLoadError(f"adapter {name}: logits with it are not finite")

    def _together(self, updates: list[tuple[Part, Packed]]) -> tuple[tuple[Part, Packed], ...]:
        """The same updates, next to each other in memory where the kernels read them."""
        packed = [update for _, update in updates if isinstance(update, PackedUpdate)]
        if self._kernels is None or not packed:
            return tuple(updates)
        parts = [part for part, _ in updates]
        return tuple(zip(parts, self._kernels.together(packed), strict=True))

    def _fit(self, adapter: str, name: str, update: LowRankUpdate) -> tuple[Part, Packed]:
        """An update as its layer takes it.

        Raises:
            ModelLoadError: there is no such layer, it has another shape, or it is not adapted.
        """
        if name in self._refused:
            raise ModelLoadError(f"adapter {adapter}: {self._refused[name]}")
        part, cut = self._parts.get(name), self._loaded.cuts.get(name)
        if part is None:
            raise _unknown_layer(adapter, name)
        _check_shape(adapter, name, update, _whole_shape(part, cut))
        update = _part_of(update, cut)
        if self._rounds_to is not None:
            update = update.rounded(self._rounds_to)
        packed = part.pack(update)
        if not all(torch.isfinite(matrix).all() for matrix in packed[:2]):
            raise ModelLoadError(
                f"adapter {adapter}: its update of {name} is too large for "
                f"{self._rounds_to or self._loaded.dtype}"
            )
        return part, packed

    @torch.no_grad()
    def _wrap(self) -> None:
        model = self._loaded.model
        output = plain(model.get_output_embeddings())  # type: ignore[no-untyped-call]
        parents = parents_of_layers(model)
        sites: defaultdict[nn.Module, list[_Site]] = defaultdict(list)
        for site in _sites(model):
            if reason := _reason(site, output):
                self._refused[site.name] = reason
            else:
                sites[site.layer].append(site)
        wrapped = []
        for layer, own in sites.items():
            adapted = AdaptedLinear(layer, self._updates(own), self.step).eval()
            _replace(parents[layer], adapted)
            wrapped.append((adapted, own))
        reasons = self._reasons([adapted for adapted, _ in wrapped])
        for adapted, own in wrapped:
            if reason := reasons.get(adapted):
                _replace(parents[adapted.layer], adapted.layer)
                self._refused |= {site.name: reason.format(site.name) for site in own}
            else:
                self._parts |= {
                    site.name: part for site, part in zip(own, adapted.updates.parts, strict=True)
                }

    def _updates(self, sites: list[_Site]) -> AddUpdates:
        if self._kernels is not None:
            return KernelUpdates(self._kernels, self.num_slots, [site.place for site in sites])
        like = torch.empty(0, dtype=self._loaded.dtype, device=self._loaded.device)
        places = [site.place for site in sites]
        if self.capacity is not None:
            return SegmentedUpdates(like, self.num_slots, places, self.capacity)
        return TorchUpdates(like, self.num_slots, places)

    def _reasons(self, layers: list[AdaptedLinear]) -> dict[nn.Module, str]:
        """Why layers cannot be adapted, as a text of the model shows."""
        for layer in layers:
            layer.watches = True
        try:
            self._logits(0)
        except Exception as error:
            text = "the model does not run with places for adapters: " + first_line(error)
            return dict.fromkeys(layers, text.replace("{", "{{").replace("}", "}}"))
        reasons: dict[nn.Module, str] = {}
        for layer in layers:
            layer.watches = False
            if not layer.num_rows:
                reasons[layer] = "the model reads the weight of {} itself and does not call it"
            elif {*layer.num_rows} != {SELF_CHECK_TOKENS}:
                reasons[layer] = "the model gives {} other rows than a text's tokens"
        return reasons

    def _logits(self, slot: int) -> torch.Tensor:
        """Those of a text whose tokens have the adapter in a slot."""
        slots = torch.full((SELF_CHECK_TOKENS,), slot, device=self._loaded.device)
        self.step.adapted = AdaptedRows(SELF_CHECK_TOKENS, None, slots)
        try:
            return one_step_logits(self._loaded, ReferenceAttention())
        finally:
            self.step.adapted = None


def check_updates(adapter: Adapter, model: PreTrainedModel) -> None:
    """Checks whether a model has the layers that an adapter changes, before weights are loaded.

    Args:
        adapter: of its updates only the shapes are looked at.
        model: as transformers builds it; its weights may have shapes alone.

    Raises:
        ModelLoadError: there is no such layer, it has another shape, or it is the output layer.
    """
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    sites = {site.name: site for site in _sites(model)}
    for name, update in adapter.updates.items():
        site = sites.get(name)
        if site is None:
            raise _unknown_layer(adapter.name, name)
        if reason := _reason(site, output):
            raise ModelLoadError(f"adapter {adapter.name}: {reason}")
        _check_shape(adapter.name, name, update, [site.place.out_features, site.place.in_features])


def _reason(site: _Site, output: nn.Module) -> str | None:
    """Why a layer is not adapted, without looking at how the model uses it."""
    if site.layer is output:
        return f"an update of the output layer ({site.name}) is not applied"
    return None


def _unknown_layer(adapter: str, name: str) -> ModelLoadError:
    return ModelLoadError(f"adapter {adapter}: the model has no linear layer {name}")


def _check_shape(adapter: str, name: str, update: LowRankUpdate, wanted: list[int]) -> None:
    """Checks that an update is for a layer of this many outputs and inputs.

    Raises:
        ModelLoadError: it is not.
    """
    shape = [update.up.shape[0], update.down.shape[1]]
    if shape != wanted:
        raise ModelLoadError(
            f"adapter {adapter}: its update of {name} is for a weight {shape}, and the model's is "
            f"{wanted}"
        )


def _whole_shape(part: Part, cut: Cut | None) -> list[int]:
    """The outputs and inputs of a layer, of all ranks."""
    shape = [part.out_features, part.in_features]
    if cut is not None:
        shape[cut.dim] = cut.total
    return shape


def _part_of(update: LowRankUpdate, cut: Cut | None) -> LowRankUpdate:
    """What a rank needs of an update for its part of the layer."""
    if cut is None:
        return update
    if cut.dim == 0:
        return update._replace(up=update.up.narrow(0, cut.first, cut.size))
    return update._replace(down=update.down.narrow(1, cut.first, cut.size))


def _replace(parents: list[tuple[nn.Module, str]], layer: nn.Module) -> None:
    for parent, attribute in parents:
        setattr(parent, attribute, layer)


def _sites(model: nn.Module) -> list[_Site]:
    """Where an update may go, by the names of linear layers before any were merged."""
    sites: dict[str, _Site] = {}
    merged: dict[str, FusedMLP] = {}
    parts: dict[str, ProjectionPart] = {}
    names: dict[nn.Module, str] = {}
    kinds = (PackedExperts, PackedMatrix)
    mixtures = (module for module in model.modules() if isinstance(module, kinds))
    experts = {layer for mixture in mixtures for layer in mixture.children()}
    for name, module in model.named_modules():
        names.setdefault(plain(module), name)  # that of the layer around it, where there is one
    for module, name in names.items():
        if isinstance(module, FusedMLP) and module.merged:
            merged[name] = module
        elif isinstance(module, ProjectionPart):
            parts[name] = module
        elif module not in experts and (shape := _shape(module)) is not None:
            sites[name] = _Site(name, module, Place(0, *shape))
    for name, mlp in merged.items():
        whole = sites.pop(f"{name}.gate_up_proj")
        width = whole.place.out_features // len(mlp.merged)
        for index, merged_name in enumerate(mlp.merged):
            own = f"{name}.{merged_name}"
            place = Place(index * width, width, whole.place.in_features)
            sites[own] = _Site(own, whole.layer, place)
    wholes = {id(site.layer): site for site in sites.values()}
    for name, piece in parts.items():
        whole = wholes[id(piece.merged.whole)]
        sites.pop(f"{name}.merged.whole", None)  # of the first part
        place = Place(piece.first, piece.width, whole.place.in_features)
        sites[name] = _Site(name, whole.layer, place)
    return list(sites.values())


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of outputs and inputs of a linear layer of any kind; None for other modules."""
    sizes = [getattr(module, name, None) for name in ("out_features", "in_features")]
    match sizes:
        case [int(out_features), int(in_features)]:
            return out_features, in_features
    if type(module).__name__ == "Conv1D":
        out_features, in_features = output_rows(module).shape
        return out_features, in_features
    return None
