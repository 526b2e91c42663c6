"""Looks up the angles of rotary embeddings, which models compute anew in every step.

They depend on a token's position alone, and are a handful of small operations: next to nothing to
compute, but each has to be started. What stands in a table is what the model's own layer gave.

Where that layer looks at the longest position of a step as well (transformers' "longrope"), the
table has the angles of a text as long as the table: the tokens of one request would otherwise
depend on who else is in the step, and keys in the cache would not fit together.
"""

from __future__ import annotations

import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import parents_of_layers

logger = logging.getLogger(__name__)

_ARGUMENTS = ("x", "position_ids", "layer_type")  # of transformers' layers; the last is rare


class RotaryTable(nn.Module):
    """The angles of the first positions, in place of a layer that computes them.

    Args:
        stock: the layer.
        like: a tensor of the model's format, on its device.
        num_positions: how many positions it has at first.

    Raises:
        ValueError: the layer computes something else.
    """

    def __init__(self, stock: nn.Module, like: Tensor, num_positions: int) -> None:
        super().__init__()
        self.stock = stock
        self._like = like
        self._tables = self._computed(num_positions)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [..., rotary_dim] for positions [...]."""
        cos, sin = F.embedding(position_ids, self._tables[layer_type]).chunk(2, dim=-1)
        return cos, sin

    def extend(self, num_positions: int) -> bool:
        """Makes room for more positions; returns whether those it had keep their angles."""
        before, self._tables = self._tables, self._computed(num_positions)
        return all(
            torch.allclose(self._tables[kind][: len(table)], table, rtol=0, atol=1e-6)
            for kind, table in before.items()
        )

    @torch.inference_mode()
    def _computed(self, num_positions: int) -> dict[str | None, Tensor]:
        """Cosines and sines [num_positions, 2 * rotary_dim] for each type of layers."""
        positions = torch.arange(num_positions, device=self._like.device).unsqueeze(0)
        tables = {}
        for kind in _layer_types(self.stock):
            cos, sin = self.stock(self._like, positions, *([] if kind is None else [kind]))
            if cos.shape != sin.shape or cos.shape[:-1] != positions.shape:
                raise ValueError("not the angles of positions")
            tables[kind] = torch.cat([cos, sin], dim=-1)[0]
        return tables


def tabulate_rotary(model: nn.Module, like: Tensor, num_positions: int) -> list[RotaryTable]:
    """Puts a table in place of every layer that computes angles; returns them.

    Args:
        model: its logits must be compared before it serves.
        like: a tensor of the model's format, on its device.
        num_positions: that the tables have.
    """
    tables = []
    for layer, homes in parents_of_layers(model).items():
        if not _computes_rotary(layer):
            continue
        try:
            table = RotaryTable(layer, like, num_positions)
        except Exception:  # it wants something else, and is not what it looked like
            logger.debug("no table for %s", layer, exc_info=True)
            continue
        tables.append(table)
        for parent, name in homes:
            setattr(parent, name, table)
    return tables


def restore_rotary(model: nn.Module) -> None:
    """Puts the model's own layers back."""
    for layer, homes in parents_of_layers(model).items():
        if isinstance(layer, RotaryTable):
            for parent, name in homes:
                setattr(parent, name, layer.stock)


def _computes_rotary(layer: nn.Module) -> bool:
    """Whether a layer is worth trying: it is called so, and takes positions."""
    if not type(layer).__name__.endswith("RotaryEmbedding"):
        return False
    arguments = tuple(inspect.signature(layer.forward).parameters)
    return arguments in (_ARGUMENTS[:2], _ARGUMENTS)


def _layer_types(layer: nn.Module) -> list[str | None]:
    """The types of layers that have angles of their own; None where all have the same."""
    if "layer_type" not in inspect.signature(layer.forward).parameters:
        return [None]
    types = layer.layer_types
    assert isinstance(types, list)
    return types
