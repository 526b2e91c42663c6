"""Finds the parents of a model's layers, which is what it takes to replace a layer."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


def parents_of_layers(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each layer its parents and its attribute names there; shared layers have several."""
    found: defaultdict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            found[child].append((parent, name))
    return dict(found)
