"""Query, key and value of an attention layer by one matrix product instead of three.

Models call the three layers by name in the middle of their attention, so the first call computes
all, and the other two take their share of its result, if they are given the same tensor. Products
with few columns keep little of a GPU busy, and rows are rounded once where weights have 8 bits. On
a CPU it was no faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Replacements, merged_linear

_NAMES = ("q_proj", "k_proj", "v_proj")


class MergedProjections(nn.Module):
    """A product whose columns belong to several layers; it keeps a result until all have theirs.

    The product is a plain linear layer, which may be quantised or get adapters later.
    """

    def __init__(self, whole: nn.Linear, widths: Sequence[int]) -> None:
        """Take over the merged layer; `widths` are the columns of each part."""
        super().__init__()
        self.whole = whole
        self.widths = tuple(widths)
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """The columns of one part of the product with x [..., in_features]."""
        if x is not self._input or index not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self.whole(x).split(self.widths, dim=-1)))
        result = self._parts.pop(index)
        if not self._parts:  # nothing may be kept in memory until the next step
            self._input = None
        return result


class ProjectionPart(nn.Module):
    """One of the layers that a merged product stands for."""

    def __init__(self, merged: MergedProjections, index: int) -> None:
        """Take the part of this index."""
        super().__init__()
        self.merged = merged
        self.index = index

    @property
    def first(self) -> int:
        """Its first column in the merged product."""
        return sum(self.merged.widths[: self.index])

    @property
    def width(self) -> int:
        """The number of its columns."""
        return self.merged.widths[self.index]

    def forward(self, x: Tensor) -> Tensor:
        """Return its columns of the product with x [..., in_features]."""
        return self.merged.part(self.index, x)


@dataclass(slots=True)
class Merging(Replacements):
    """What was replaced; the original layers share their weights with the new ones."""

    num_merged: int = 0


@torch.no_grad()
def merge_projections(model: nn.Module) -> Merging:
    """Merges query, key and value wherever a module has these three layers."""
    merging = Merging()
    for parent in [*model.modules()]:
        layers = [getattr(parent, name, None) for name in _NAMES]
        linears = [layer for layer in layers if type(layer) is nn.Linear]
        if len(linears) != len(_NAMES) or not _fit_together(linears):
            continue
        widths = [layer.out_features for layer in linears]
        merged = MergedProjections(merged_linear(linears), widths).train(parent.training)
        for index, (name, layer) in enumerate(zip(_NAMES, linears, strict=True)):
            merging.put(parent, name, ProjectionPart(merged, index).train(layer.training))
        merging.num_merged += 1
    return merging


def _fit_together(layers: Sequence[nn.Linear]) -> bool:
    """Whether one layer can stand for these: nothing else is in them, and no hook sees them."""
    kinds = {
        (
            layer.in_features,
            layer.weight.dtype,
            layer.weight.device,
            tuple(sorted(name for name, _ in layer.named_parameters())),
        )
        for layer in layers
    }
    hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    distinct = len({id(layer) for layer in layers}) == len({id(layer.weight) for layer in layers})
    names = kinds.pop()[-1]
    return not kinds and not hooks and distinct and set(names) <= {"weight", "bias"}
