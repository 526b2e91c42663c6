"""Tables of the rotary embedding (cosines and sines), which models compute again in every step.

They depend on a token's position alone, and take a handful of small operations: hardly anything to
compute, but each operation has to be launched. A table holds the results of the model's own layer.

If that layer depends on the longest position of a step as well (transformers' "longrope"), the
table is computed as for a text of the table's length: otherwise the tokens of one request would
depend on the other requests in the step, and keys in the cache would not fit together.

Models that know where a token stands in an image have three positions per token. In texts these are
equal, and a table has them; in prompts with images the model's layer computes.
"""

from __future__ import annotations

import inspect
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import parents_of_layers

logger = logging.getLogger(__name__)

_THREE = 3  # dimensions of positions in time, height and width; others have two
_ARGUMENTS = ("x", "position_ids", "layer_type")  # of transformers' layers; the last is rare


class RotaryTable(nn.Module):
    """Replaces a rotary embedding layer by tables of its cosines and sines.

    Args:
        stock: the model's layer.
        like: a tensor of the model's dtype, on its device.
        num_positions: how many positions the tables have at first.

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
        """Return cosines and sines [..., rotary_dim] for positions [...].

        Where positions are [3, ...], results have no such dimension.
        """
        if position_ids.dim() == _THREE:
            if position_ids.stride(0):  # not one position, three times
                return self._stock_rotation(x, position_ids, layer_type)
            position_ids = position_ids[0]
        cos, sin = F.embedding(position_ids, self._tables[layer_type]).chunk(2, dim=-1)
        return cos, sin

    def extend(self, num_positions: int) -> bool:
        """Computes the tables for more positions.

        Returns:
            Whether the positions that they had before keep their cosines and sines.
        """
        before, self._tables = self._tables, self._computed(num_positions)
        return all(
            torch.allclose(self._tables[kind][: len(table)], table, rtol=0, atol=1e-6)
            for kind, table in before.items()
        )

    def _stock_rotation(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self.stock(x, position_ids, *([] if layer_type is None else [layer_type]))
        return cos, sin

    @torch.inference_mode()
    def _computed(self, num_positions: int) -> dict[str | None, Tensor]:
        """Cosines and sines [num_positions, 2 * rotary_dim] for each type of layers.

        Raises:
            ValueError: the layer computes something else.
        """
        positions = torch.arange(num_positions, device=self._like.device).unsqueeze(0)
        # Layers that divide their frequencies among three positions take nothing else in 5.17.
        is_divided = hasattr(self.stock, "mrope_section")
        given = positions.expand(_THREE, -1, -1) if is_divided else positions
        tables = {}
        for kind in _layer_types(self.stock):
            cos, sin = self._stock_rotation(self._like, given, kind)
            if cos.shape != sin.shape or cos.shape[:-1] != positions.shape:
                raise ValueError("not the cosines and sines of positions")
            tables[kind] = torch.cat([cos, sin], dim=-1)[0]
        return tables


def tabulate_rotary(model: nn.Module, like: Tensor, num_positions: int) -> list[RotaryTable]:
    """Replaces every rotary embedding layer of a model by a table; returns the tables.

    Args:
        model: its logits must be compared before it serves.
        like: a tensor of the model's dtype, on its device.
        num_positions: how many positions the tables have.
    """
    tables = []
    for layer, parents in parents_of_layers(model).items():
        if not _computes_rotary(layer):
            continue
        try:
            table = RotaryTable(layer, like, num_positions)
        except Exception:  # it needs other inputs, so it is another kind of layer
            logger.debug("no table for %s", layer, exc_info=True)
            continue
        tables.append(table)
        for parent, name in parents:
            setattr(parent, name, table)
    return tables


def restore_rotary(model: nn.Module) -> None:
    """Puts the model's own layers back."""
    for layer, parents in parents_of_layers(model).items():
        if isinstance(layer, RotaryTable):
            for parent, name in parents:
                setattr(parent, name, layer.stock)


def _computes_rotary(layer: nn.Module) -> bool:
    """Whether a layer is likely to be one: it has the name, and takes positions."""
    if not type(layer).__name__.endswith("RotaryEmbedding"):
        return False
    arguments = tuple(inspect.signature(layer.forward).parameters)
    return arguments in (_ARGUMENTS[:2], _ARGUMENTS)


def _layer_types(layer: nn.Module) -> list[str | None]:
    """The layer types with rotary embeddings of their own; only None if all have the same."""
    if "layer_type" not in inspect.signature(layer.forward).parameters:
        return [None]
    types = layer.layer_types
    assert isinstance(types, list)
    return types
