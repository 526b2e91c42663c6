"""Layers of which a rank has a part, around plain layers that can be fused, packed and quantised.

They hold the plain layer as `local`, under which the passes over a model find and replace it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .group import Group


def plain(layer: nn.Module) -> nn.Module:
    """The plain layer of one that gives a whole result; others are plain themselves."""
    return layer.local if isinstance(layer, SummedLinear | GatheredLinear) else layer


class SummedLinear(nn.Module):
    """A linear layer divided by inputs: the sum of the ranks' products is its output.

    Args:
        local: the product of this rank's inputs, without a bias.
        bias: is added once, after the sum.
        group: the ranks.
        splits_input: whether the input is whole, so that this rank takes its part of it.
    """

    def __init__(
        self, local: nn.Linear, bias: nn.Parameter | None, group: Group, *, splits_input: bool
    ) -> None:
        """Take over the layer."""
        super().__init__()
        self.local = local
        self.bias = bias
        self._group = group
        self._first = group.rank * local.in_features if splits_input else None
        self._num_inputs = local.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole output for this rank's part of the input."""
        if self._first is not None:
            x = x.narrow(-1, self._first, self._num_inputs)
        output = self._group.sum(self.local(x))
        return output if self.bias is None else output + self.bias


class GatheredLinear(nn.Module):
    """A linear layer divided by outputs, which every rank needs whole, such as the logits."""

    def __init__(self, local: nn.Linear, group: Group) -> None:
        """Take over this rank's outputs."""
        super().__init__()
        self.local = local
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all ranks."""
        return self._group.concatenate(self.local(x))


class DividedEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some tokens."""

    def __init__(self, local: nn.Embedding, group: Group) -> None:
        """Take over this rank's rows."""
        super().__init__()
        self.local = local
        self._group = group
        self._first = group.rank * local.num_embeddings

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of all tokens: one rank has each, the others add zeros."""
        own_ids = token_ids - self._first
        is_own = (own_ids >= 0) & (own_ids < self.local.num_embeddings)
        rows = self.local(own_ids.clamp(0, self.local.num_embeddings - 1))
        return self._group.sum(torch.where(is_own.unsqueeze(-1), rows, 0.0))
