"""A model's layers: where they are, by which others they are replaced, which have to stay.

A layer can be replaced by one that computes the same if the model only calls it. Some models also
read a layer's weight, as a router may that asks for its format: such layers have to stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..kernels.packed_linear import is_linear


@dataclass(slots=True)
class Replacements:
    """What was replaced in a model, to undo it if the model's logits change.

    Attributes:
        replaced: a parent, an attribute of it, and the layer that was there. The layer is kept with
            its weights, which it may share with the new one.
    """

    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def put(self, parent: nn.Module, name: str, layer: nn.Module) -> None:
        """Puts a layer in the place of another one."""
        self.replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, layer)

    def undo(self) -> None:
        """Puts every original layer back."""
        for parent, name, layer in self.replaced:
            setattr(parent, name, layer)


def merged_linear(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all, whose weights become views of its own.

    Args:
        layers: they have equally many inputs, one dtype and device, and all or none has a bias.
    """
    has_bias = layers[0].bias is not None
    widths = [layer.out_features for layer in layers]
    merged = nn.Linear(layers[0].in_features, sum(widths), bias=has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        parts = [getattr(layer, name) for layer in layers]
        whole = nn.Parameter(torch.cat(parts), requires_grad=parts[0].requires_grad)
        setattr(merged, name, whole)
        for part, share in zip(parts, torch.split(whole.data, widths), strict=True):
            part.data = share
    return merged


def parents_of_layers(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each layer its parents and its attribute names there; shared layers have several."""
    found: defaultdict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            found[child].append((parent, name))
    return dict(found)


def layers_read_by(model: nn.Module, compute: Callable[[], object]) -> frozenset[nn.Module]:
    """The linear layers whose weight a model reads itself, besides calling them.

    Args:
        model: its linear layers are watched.
        compute: runs the model.
    """
    read: set[nn.Module] = set()
    stock = {layer: type(layer) for layer in model.modules() if is_linear(layer)}
    watched = {kind: _watched(kind, read) for kind in set(stock.values())}
    try:
        for layer, kind in stock.items():
            layer.__class__ = watched[kind]
        compute()
    finally:
        for layer, kind in stock.items():
            layer.__class__ = kind
    return frozenset(read)


def _watched(kind: type[nn.Module], read: set[nn.Module]) -> type[nn.Module]:
    """A class of layers that notes a layer whose weight is read outside its own forward."""
    calls: list[nn.Module] = []  # in progress

    class Watched(kind):  # type: ignore[valid-type, misc]
        def forward(self, *inputs: Any) -> Any:
            calls.append(self)
            try:
                return super().forward(*inputs)
            finally:
                calls.pop()

        def __getattr__(self, name: str) -> Any:  # torch keeps weights where this finds them
            if name == "weight" and not calls:
                read.add(self)
            return super().__getattr__(name)

    return Watched
