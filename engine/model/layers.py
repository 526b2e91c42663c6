"""Finds a model's layers: their parents, which it takes to replace one, and those in plain sight.

A layer can be replaced by one that computes the same if the model only calls it. Some models also
read a layer's weight, as a router may that asks for its format: such layers have to stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

from ..kernels.packed_linear import is_linear


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
