"""The layers of a model that have a state, computed sequence by sequence.

A step's tokens are packed, which attention and all that works on single tokens can take as they
are. A layer with a state cannot: its input is divided into the sequences, and each is computed with
its own state by the model's own code, through the cache object that transformers gives such layers.
Sequences of which one token is computed are taken together, as a batch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..batch import StateRows
from .layer_state import LayerState, LayerStates, StatePool


@dataclass(frozen=True, slots=True)
class StatefulLayer:
    """A layer that has a state.

    Attributes:
        module: it takes hidden states [batch, num_tokens, hidden_size] and returns such.
        name: of the module, in the model.
        cache_argument: the name of its parameter for the cache.
        state: what it keeps of a sequence.
    """

    module: nn.Module
    name: str
    cache_argument: str
    state: LayerState


class StepStates(NamedTuple):
    """The states before a step, and after it; and the step's sequences."""

    pool: StatePool
    rows: StateRows

    @classmethod
    def of(cls, pool: StatePool | None, rows: StateRows | None) -> Self | None:
        """Both, or None for a model that keeps no states."""
        return None if pool is None or rows is None else cls(pool, rows)


class Recurrence:
    """The layers with a state of one model.

    Args:
        layers: by their indexes in the model; they compute packed steps from now on.

    Attributes:
        states: what each layer keeps of a sequence, by its index.
        names: of the layers' modules.
        token_by_token: whether several tokens of a text that has begun are computed one after the
            other. Layers need it whose code for several tokens begins with an empty state.
    """

    def __init__(self, layers: Mapping[int, StatefulLayer]) -> None:
        self.states = {index: layer.state for index, layer in layers.items()}
        self.names = frozenset(layer.name for layer in layers.values())
        self.token_by_token = False
        self._step: _Step | None = None
        for index, layer in layers.items():
            layer.module.forward = self._packed(index, layer)

    def contains(self, name: str) -> bool:
        """Whether the module of this name is a part of one of these layers."""
        return any(name.startswith(f"{layer}.") for layer in self.names)

    @contextlib.contextmanager
    def computing(self, states: StepStates) -> Iterator[None]:
        """While it lasts the layers compute a packed step."""
        self._step = _step(*states, token_by_token=self.token_by_token)
        try:
            yield
        finally:
            self._step = None

    def _packed(self, index: int, layer: StatefulLayer) -> Callable[..., Tensor]:
        stock = layer.module.forward

        def forward(*args: Any, **options: Any) -> Tensor:
            if self._step is None:
                output = stock(*args, **options)
                assert isinstance(output, Tensor)
                return output
            hidden_states = args[0] if args else options["hidden_states"]

            def compute(part: Tensor, states: LayerStates, *, begins: bool = False) -> Tensor:
                cache = _cache(index, states, begins=begins)
                output = stock(part, **{layer.cache_argument: cache})
                assert isinstance(output, Tensor)
                return output

            return self._step.compute(index, hidden_states, compute)

        return forward


class _Part(NamedTuple):
    """The tokens `start` … `end` - 1 of a step, of a sequence that has its state in a slot."""

    start: int
    end: int
    slot: int
    begins: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A step, divided by what can be computed together.

    Attributes:
        pool: the states.
        rows: int64 [num_decoding], the tokens of sequences of which one token is computed.
        slots: int64 [num_decoding], of these sequences.
        parts: all other sequences, in the order in which they are computed.
    """

    pool: StatePool
    rows: Tensor
    slots: Tensor
    parts: tuple[_Part, ...]

    def compute(self, layer: int, hidden_states: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        """The outputs of a layer, as `hidden_states` [1, num_tokens, hidden_size]."""
        output = torch.empty_like(hidden_states)
        if len(self.rows):
            states = self.pool.gather(layer, self.slots)
            tokens = hidden_states[0, self.rows].unsqueeze(1)
            output[0, self.rows] = compute(tokens, states)[:, 0]
            self.pool.scatter(layer, self.slots, states)
        for start, end, slot, begins in self.parts:
            states = self.pool.at(layer, slot)
            output[:, start:end] = compute(hidden_states[:, start:end], states, begins=begins)
        return output


def _step(pool: StatePool, rows: StateRows, *, token_by_token: bool) -> _Step:
    decoding: list[tuple[int, int]] = []
    parts: list[_Part] = []
    bounds = itertools.pairwise(rows.starts)
    for (start, end), slot, begins in zip(bounds, rows.slots, rows.begins, strict=True):
        if end - start == 1 and not begins:
            decoding.append((start, slot))
        elif token_by_token and not begins:
            parts += [_Part(token, token + 1, slot, False) for token in range(start, end)]
        else:
            parts.append(_Part(start, end, slot, begins))
    pairs = torch.tensor(decoding, dtype=torch.int64, device=rows.device).view(-1, 2)
    return _Step(pool, pairs[:, 0], pairs[:, 1], (*parts,))


def _cache(index: int, states: LayerStates, *, begins: bool) -> Cache:
    """A cache of transformers for the layer `index`, which reads and writes these tensors."""
    layer = LinearAttentionLayer(number_of_states=max(len(states.conv), len(states.recurrent)))
    for number, tensor in states.conv.items():
        layer.conv_states[number] = tensor
        layer.conv_kernel_size[number] = tensor.shape[-1]
        layer.is_conv_states_initialized[number] = True
    for number, tensor in states.recurrent.items():
        layer.recurrent_states[number] = tensor
        layer.is_recurrent_states_initialized[number] = True
    layer.has_previous_state = dict.fromkeys(layer.has_previous_state, not begins)
    return Cache(layers=[layer] * (index + 1))
