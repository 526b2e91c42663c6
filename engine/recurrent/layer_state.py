"""What a layer remembers of a text, and where the states of all sequences are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor of a sequence's state, without a batch dimension."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of one layer, by the numbers under which the layer asks for its parts.

    Attributes:
        conv: the latest inputs of convolutions, [channels, kernel size].
        recurrent: what is carried from token to token, [num_heads, …].
    """

    conv: Mapping[int, StateShape]
    recurrent: Mapping[int, StateShape]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence."""
        return sum(shape.num_bytes for shape in (*self.conv.values(), *self.recurrent.values()))


@dataclass(frozen=True, slots=True)
class LayerStates:
    """The states of several sequences in one layer: as `LayerState`, each tensor with a batch."""

    conv: dict[int, Tensor]
    recurrent: dict[int, Tensor]


class StatePool:
    """The states of texts, a slot for each.

    Args:
        layers: the state of each layer, by the layer's index.
        num_seqs: sequences that can run at the same time.
        device: where the layers compute.
        num_copies: slots beside theirs, for states that are kept.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerState],
        num_seqs: int,
        device: torch.device,
        num_copies: int = 0,
    ) -> None:
        self.num_seqs = num_seqs
        self.num_copies = num_copies
        self.num_slots = num_slots = num_seqs + num_copies
        self.bytes_per_slot = bytes_per_slot(layers)

        def zeros(shapes: Mapping[int, StateShape]) -> dict[int, Tensor]:
            return {
                number: torch.zeros(num_slots, *shape.size, dtype=shape.dtype, device=device)
                for number, shape in shapes.items()
            }

        self._layers = {
            index: LayerStates(zeros(layer.conv), zeros(layer.recurrent))
            for index, layer in layers.items()
        }

    def at(self, layer: int, slot: int) -> LayerStates:
        """The state in one slot: a batch of one, whose tensors are the pool's own."""
        return self._each(layer, lambda states: states[slot : slot + 1])

    def gather(self, layer: int, slots: Tensor) -> LayerStates:
        """Copies of the states in these slots, int64 [num_seqs]."""
        return self._each(layer, lambda states: states.index_select(0, slots))

    def scatter(self, layer: int, slots: Tensor, states: LayerStates) -> None:
        """Puts states back that `gather` copied."""
        own = self._layers[layer]
        for number, tensor in states.conv.items():
            own.conv[number].index_copy_(0, slots, tensor)
        for number, tensor in states.recurrent.items():
            own.recurrent[number].index_copy_(0, slots, tensor)

    def copy(self, layer: int, sources: Tensor, targets: Tensor) -> None:
        """Copies states from slots to slots, all at once: int64 [num_copies] each."""
        self.scatter(layer, targets, self.gather(layer, sources))

    def clear(self, slot: int) -> None:
        """Makes a state one of no text."""
        for own in self._layers.values():
            for tensor in (*own.conv.values(), *own.recurrent.values()):
                tensor[slot] = 0

    def keep(self, layer: int, slot: int, copy: int) -> None:
        """Copies the state of one slot to another."""
        own = self._layers[layer]
        for tensor in (*own.conv.values(), *own.recurrent.values()):
            tensor[copy] = tensor[slot]

    def _each(self, layer: int, part: Callable[[Tensor], Tensor]) -> LayerStates:
        own = self._layers[layer]
        return LayerStates(
            {number: part(tensor) for number, tensor in own.conv.items()},
            {number: part(tensor) for number, tensor in own.recurrent.items()},
        )


def bytes_per_slot(layers: Mapping[int, LayerState]) -> int:
    """Bytes that a sequence's state takes in all layers."""
    return sum(layer.num_bytes for layer in layers.values())
