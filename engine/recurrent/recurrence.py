"""The layers of a model that have a state, computed sequence by sequence.

A step's tokens are packed, which attention and all that works on single tokens can take as they
are. A layer with a state cannot: its input is divided into the sequences, and each is computed with
its own state by the model's own code, through the cache object that transformers gives such layers.
Sequences of which one token is computed are taken together, as a batch. So are those with draft
tokens, token by token, since the state has to be that of the accepted ones afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..batch.model_input import SequenceState, StateRows
from .layer_state import LayerState, LayerStates, StatePool


@dataclass(frozen=True, slots=True)
class StatefulLayer:
    """A layer that has a state.

    Attributes:
        module: it takes hidden states [batch, num_tokens, hidden_size] and returns such.
        name: of the module, in the model.
        cache_argument: the name of its parameter for the cache.
        state: what it keeps of a sequence.
        is_tuple: whether what it returns is the first of several things; the others are not used.
    """

    module: nn.Module
    name: str
    cache_argument: str
    state: LayerState
    is_tuple: bool = False

    def absent(self) -> dict[str, None]:
        """Parameters that have no default and are of no use to it, such as angles and masks."""
        first, *others = inspect.signature(self.module.forward).parameters.values()
        kinds = {first.POSITIONAL_OR_KEYWORD, first.KEYWORD_ONLY}
        needed = (one.name for one in others if one.default is one.empty and one.kind in kinds)
        return dict.fromkeys(name for name in needed if name != self.cache_argument)


Rows = Tensor | slice  # some of a step's tokens: int64 [num_rows], or from one to another


class StepStates(NamedTuple):
    """The states before a step, and after it; and the step's sequences."""

    pool: StatePool
    rows: StateRows

    @classmethod
    def of(cls, pool: StatePool | None, rows: StateRows | None) -> Self | None:
        """Both, or None for a model that keeps no states."""
        return None if pool is None or rows is None else cls(pool, rows)


_Forward = Callable[..., Any]


class Recurrence:
    """The layers with a state of one model.

    Args:
        layers: by their indexes in the model; they compute packed steps from now on.

    Attributes:
        states: what each layer keeps of a sequence, by its index.
        names: of the layers' modules.
        token_by_token: whether several tokens of a text that has begun are computed one after the
            other. Layers need it whose code for several tokens begins with an empty state.
        selecting: entered while a layer computes these of a step's rows, and no others.
    """

    def __init__(self, layers: Mapping[int, StatefulLayer]) -> None:
        self.states = {index: layer.state for index, layer in layers.items()}
        self.names = frozenset(layer.name for layer in layers.values())
        self.token_by_token = False
        self.selecting: Callable[[Rows], AbstractContextManager[None]] = lambda _: nullcontext()
        self._step: _Step | None = None
        self._forwards: dict[int, _Forward] = {
            index: layer.module.forward for index, layer in layers.items()
        }
        for index, layer in layers.items():
            layer.module.forward = self._packed(index, layer)

    def change(self, make: Callable[[_Forward, LayerState], _Forward | None]) -> int:
        """Has layers compute single texts otherwise; returns how many do.

        Args:
            make: gives for a layer's own forward another one, or None to leave it.
        """
        found = {index: make(one, self.states[index]) for index, one in self._forwards.items()}
        changed = {index: forward for index, forward in found.items() if forward is not None}
        self._forwards |= changed
        return len(changed)

    @contextlib.contextmanager
    def computing(self, states: StepStates) -> Iterator[None]:
        """While it lasts the layers compute a packed step."""
        self._step = _step(*states, token_by_token=self.token_by_token)
        try:
            yield
        finally:
            self._step = None

    def _packed(self, index: int, layer: StatefulLayer) -> Callable[..., Any]:
        absent = layer.absent()

        def forward(*args: Any, **options: Any) -> Any:
            stock = self._forwards[index]
            if self._step is None:
                return stock(*args, **options)
            hidden_states = args[0] if args else options["hidden_states"]

            def compute(
                rows: Rows, tokens: Tensor, states: LayerStates, *, begins: bool = False
            ) -> Tensor:
                cache = _cache(index, states, begins=begins)
                with self.selecting(rows):
                    output = stock(tokens, **absent, **{layer.cache_argument: cache})
                first = output[0] if layer.is_tuple else output
                assert isinstance(first, Tensor)
                return first

            computed = self._step.compute(index, hidden_states, compute)
            return (computed, None) if layer.is_tuple else computed

        return forward


class _Part(NamedTuple):
    """The tokens `start` … `end` - 1 of a step, of a sequence that has its state in a slot.

    `copy` is the slot in which the state after them is kept, too.
    """

    start: int
    end: int
    slot: int
    begins: bool
    copy: int | None = None


class _Copies(NamedTuple):
    """States that are copied from slots to slots: int64 [num_copies] each."""

    sources: Tensor
    targets: Tensor


class _Tokens(NamedTuple):
    """Tokens of different sequences, which are computed together: int64 [num_seqs] each.

    `rows` are the tokens, `sources` the slots of the states before them, and `targets` of those
    after them.
    """

    rows: Tensor
    sources: Tensor
    targets: Tensor


class _Compute(Protocol):
    """Computes some tokens of a step with a layer, whose states it changes."""

    def __call__(
        self, rows: Rows, tokens: Tensor, states: LayerStates, *, begins: bool = False
    ) -> Tensor:
        """The outputs of `tokens` [batch, num_tokens, hidden_size], which are these rows."""


class _Step(Protocol):
    """A step as layers with a state compute it."""

    def compute(self, layer: int, hidden_states: Tensor, compute: _Compute) -> Tensor:
        """The outputs of a layer, as `hidden_states` [1, num_tokens, hidden_size]."""


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """A step with one token of each sequence, whose states are in `slots`, int64 [num_seqs].

    The same operations whatever the slots are: it can be recorded.
    """

    pool: StatePool
    slots: Tensor

    def compute(self, layer: int, hidden_states: Tensor, compute: _Compute) -> Tensor:
        """See `_Step`."""
        states = self.pool.gather(layer, self.slots)
        output = compute(slice(None), hidden_states.transpose(0, 1), states).transpose(0, 1)
        self.pool.scatter(layer, self.slots, states)
        return output


@dataclass(frozen=True, slots=True)
class _MixedStep:
    """A step, divided by what can be computed together; it is computed in this order.

    Attributes:
        pool: the states.
        restored: of sequences that go on from a state that was kept.
        tokens: of sequences of which one token is computed, and of those with draft tokens, the
            first one of all, the second one of those that have several, and so on.
        parts: of all other sequences.
        kept: states after one of `tokens`.
    """

    pool: StatePool
    restored: _Copies
    tokens: tuple[_Tokens, ...]
    parts: tuple[_Part, ...]
    kept: _Copies

    def compute(self, layer: int, hidden_states: Tensor, compute: _Compute) -> Tensor:
        """See `_Step`."""
        output = torch.empty_like(hidden_states)
        self._copy(layer, self.restored)
        for rows, sources, targets in self.tokens:
            states = self.pool.gather(layer, sources)
            output[0, rows] = compute(rows, hidden_states[0, rows].unsqueeze(1), states)[:, 0]
            self.pool.scatter(layer, targets, states)
        for start, end, slot, begins, copy in self.parts:
            part, states = slice(start, end), self.pool.at(layer, slot)
            output[:, part] = compute(part, hidden_states[:, part], states, begins=begins)
            if copy is not None:
                self.pool.keep(layer, slot, copy)
        self._copy(layer, self.kept)
        return output

    def _copy(self, layer: int, copies: _Copies) -> None:
        if len(copies.sources):
            self.pool.copy(layer, *copies)


def _step(pool: StatePool, rows: StateRows, *, token_by_token: bool) -> _Step:
    if rows.decoding is not None:
        return _DecodeStep(pool, rows.decoding)
    parts: list[_Part] = []
    kept: list[tuple[int, int]] = []
    tokens: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    bounds = itertools.pairwise(rows.starts)
    for (start, end), state in zip(bounds, rows.sequences, strict=True):
        if end - start == 1 + len(state.drafts) and not state.begins:
            slots = (state.slot, *state.drafts, state.slot)
            for index, (source, target) in enumerate(itertools.pairwise(slots)):
                tokens[index].append((start + index, source, target))
            kept += [(slots[num_tokens], copy) for num_tokens, copy in state.copies]
        else:
            parts += _parts(state, start, end, token_by_token=token_by_token)
    restored = [(s.source, s.slot) for s in rows.sequences if s.source is not None]
    columns = partial(_columns, device=rows.device)
    return _MixedStep(
        pool,
        _Copies(*columns(restored, 2)),
        tuple(_Tokens(*columns(group, 3)) for group in tokens.values()),
        (*parts,),
        _Copies(*columns(kept, 2)),
    )


def _parts(state: SequenceState, start: int, end: int, *, token_by_token: bool) -> Iterator[_Part]:
    """The tokens of a sequence, divided where its state is to be kept."""
    begins = state.begins
    kept = {start + num_tokens: copy for num_tokens, copy in state.copies}
    for first, last in itertools.pairwise(sorted({start, end, *kept})):
        step = 1 if token_by_token and not begins else last - first
        for token in range(first, last, step):
            copy = kept.get(token + step)
            yield _Part(token, token + step, state.slot, begins, copy)
        begins = False


def _columns(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Iterator[Tensor]:
    """The columns of a table, int64 [num_rows] each, on a device."""
    return iter(torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width).unbind(1))


class _LayerCache(Cache):
    """A cache of one layer, which also has what MiniMax asks its own kind of cache for."""

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The layer's only state; None before the first token."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, LinearAttentionLayer)
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Changes the layer's only state."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, LinearAttentionLayer)
        state = layer.recurrent_states[0]
        assert state is not None
        state.copy_(linear_cache)


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
    return _LayerCache(layers=[layer] * (index + 1))
