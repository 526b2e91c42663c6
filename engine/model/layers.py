"""Where the layers of a model stand, for those who replace them."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


def parents_of_layers(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each layer its parents and its names there; shared layers have several."""
    found: defaultdict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            found[child].append((parent, name))
    return dict(found)
