"""Puts adapters beside the layers of a model that is ready to serve.

It comes last: the layers may be merged, packed or quantised by then, and their updates stay in the
model's own dtype. An update of a layer that was merged into another one is an update of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.paged import ReferenceAttention
from ..kernels.cpu import CpuKernels
from ..kernels.packed_linear import PackedLinear, output_rows
from ..model.fusion import FusedMLP
from ..model.layers import parents_of_layers
from ..model.loaded import LoadedModel, first_line
from ..model.projections import ProjectionPart
from ..model.self_check import SELF_CHECK_TOKENS, one_step_logits
from ..protocol.errors import ModelLoadError
from .adapter import Adapter, LowRankUpdate
from .low_rank import AdaptedLinear, AdaptedRows, Step


@dataclass(frozen=True, slots=True)
class _Site:
    """Where an update goes: a layer, and the rows of its weight from `first` to `first + out`."""

    layer: nn.Module
    first: int
    out_features: int
    in_features: int


@torch.no_grad()
def attach(
    loaded: LoadedModel, adapters: Sequence[Adapter], kernels: CpuKernels | None = None
) -> Step:
    """Replaces every layer that an adapter changes by one with the adapters' updates.

    Args:
        loaded: the model, after all passes.
        adapters: their order gives them their numbers in `AdaptedRows`.
        kernels: compute the updates on a CPU, if given.

    Returns:
        What the layers read: which rows of a step have which adapter.

    Raises:
        ModelLoadError: an adapter does not fit the model.
    """
    step = Step()
    sites = _sites(loaded.model)
    output = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    changed: dict[nn.Module, list[list[tuple[_Site, LowRankUpdate]]]] = {}
    for number, adapter in enumerate(adapters):
        for name, update in adapter.updates.items():
            site = _site(adapter.name, name, update, sites)
            if site.layer is output:
                raise ModelLoadError(
                    f"adapter {adapter.name}: an update of the output layer ({name}) is not applied"
                )
            if loaded.recurrence is not None and loaded.recurrence.contains(name):
                raise ModelLoadError(
                    f"adapter {adapter.name}: an update of a layer that keeps a state ({name}) is "
                    "not applied"
                )
            updates = changed.setdefault(site.layer, [[] for _ in adapters])
            updates[number].append((site, update))
    parents = parents_of_layers(loaded.model)
    for layer, by_adapter in changed.items():
        replacement = _adapted(layer, by_adapter, loaded, step, kernels)
        for parent, attribute in parents[layer]:
            setattr(parent, attribute, replacement)
    _check(loaded, adapters, step)
    return step


def _sites(model: nn.Module) -> dict[str, _Site]:
    """Where an update may go, by the names of linear layers before any were merged."""
    sites: dict[str, _Site] = {}
    merged: dict[str, FusedMLP] = {}
    parts: dict[str, ProjectionPart] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMLP) and module.merged:
            merged[name] = module
        elif isinstance(module, ProjectionPart):
            parts[name] = module
        elif (shape := _shape(module)) is not None:
            sites[name] = _Site(module, 0, *shape)
    for name, mlp in merged.items():
        whole = sites.pop(f"{name}.gate_up_proj")
        width = whole.out_features // len(mlp.merged)
        for index, part in enumerate(mlp.merged):
            sites[f"{name}.{part}"] = _Site(whole.layer, index * width, width, whole.in_features)
    wholes = {id(site.layer): site for site in sites.values()}
    for name, piece in parts.items():
        whole = wholes[id(piece.merged.whole)]
        sites.pop(f"{name}.merged.whole", None)  # of the first part
        sites[name] = _Site(whole.layer, piece.first, piece.width, whole.in_features)
    return sites


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


def _site(adapter: str, name: str, update: LowRankUpdate, sites: dict[str, _Site]) -> _Site:
    """Where an update goes.

    Raises:
        ModelLoadError: there is no such layer, or it has another shape.
    """
    site = sites.get(name)
    if site is None:
        raise ModelLoadError(f"adapter {adapter}: the model has no linear layer {name}")
    shape = [update.up.shape[0], update.down.shape[1]]
    if shape != [site.out_features, site.in_features]:
        raise ModelLoadError(
            f"adapter {adapter}: its update of {name} is for a weight {shape}, and the model's is "
            f"{[site.out_features, site.in_features]}"
        )
    return site


def _adapted(
    layer: nn.Module,
    by_adapter: list[list[tuple[_Site, LowRankUpdate]]],
    loaded: LoadedModel,
    step: Step,
    kernels: CpuKernels | None,
) -> AdaptedLinear:
    """A layer with its updates, whose matrices are put side by side."""
    shape = _shape(layer)
    assert shape is not None
    ranks = [sum(len(update.down) for _, update in updates) for updates in by_adapter]
    down = torch.zeros(sum(ranks), shape[1])
    up = torch.zeros(shape[0], sum(ranks))
    first = 0
    for site, update in (item for updates in by_adapter for item in updates):
        columns = slice(first, first + len(update.down))
        down[columns] = update.down
        up[site.first : site.first + site.out_features, columns] = update.up
        first = columns.stop
    products = [_product(matrix, loaded, kernels) for matrix in (down, up)]
    return AdaptedLinear(layer, products[0], products[1], ranks, step).eval()


def _product(matrix: Tensor, loaded: LoadedModel, kernels: CpuKernels | None) -> nn.Module:
    """A linear layer with this weight, in the model's dtype and on its device."""
    out_features, in_features = matrix.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    weight = matrix.to(loaded.device, loaded.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear if kernels is None else PackedLinear.from_linear(linear, kernels)


def _check(loaded: LoadedModel, adapters: Sequence[Adapter], step: Step) -> None:
    """Computes a text with each adapter.

    Raises:
        ModelLoadError: the model does not call a layer that is changed, or computes it otherwise.
    """
    layers = dict(_adapted_layers(loaded.model))
    owners = torch.arange(len(adapters), device=loaded.device)
    for number, adapter in enumerate(adapters):
        step.adapted = AdaptedRows(
            SELF_CHECK_TOKENS, None, owners[number].expand(SELF_CHECK_TOKENS)
        )
        try:
            logits = one_step_logits(loaded, ReferenceAttention())
        except Exception as error:
            raise ModelLoadError(
                f"adapter {adapter.name} does not run on this model: {first_line(error)}"
            ) from error
        finally:
            step.adapted = None
        if not torch.isfinite(logits).all():
            raise ModelLoadError(f"adapter {adapter.name}: logits with it are not finite")
    for name, layer in layers.items():
        if adapters and not layer.num_calls:
            raise ModelLoadError(
                f"adapters cannot change {name}: the model reads its weight and does not call it"
            )


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
