"""Packs a scheduled batch into the tensors of a step."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..block_form import BlockForm
from ..scheduling.scheduler import ScheduledBatch
from ..scheduling.sequence import Sequence
from .integers import Integers, NumberArray, model_input, upload_together
from .model_input import ModelInput, PromptRows, SequenceState, StateRows


def pack(
    batch: ScheduledBatch,
    block_size: int,
    device: torch.device,
    form: BlockForm | None = None,
) -> ModelInput:
    """Packs the tokens of a scheduled batch into tensors on `device`.

    Placeholders stay; see `ModelInput.filled`. `form` is that of the cache's blocks, where layers
    with a window have their own.
    """
    places, windowed = _places(batch, block_size, form)
    tokens = _concatenated(batch, places)
    rows, sampled, prompt_rows = _logits_rows(batch, tokens.starts)
    names, adapted, owners = _adapter_rows(batch, tokens.starts)
    states = _states(batch)
    arrays: Integers[NumberArray] = Integers(
        input_ids=np.array(tokens.input_ids, dtype=np.int64),
        positions=np.array(tokens.positions, dtype=np.int64),
        slots=np.array(tokens.slots, dtype=np.int64),
        logits_rows=np.array(rows, dtype=np.int64),
        window_slots=None if windowed is None else _all_slots(batch, windowed),
        owners=np.array(owners, dtype=np.int64) if names else None,
        adapted=np.array(adapted, dtype=np.int64) if names else None,
        states=_decoding_slots(states, len(tokens.input_ids)),
        block_tables=_block_tables(places),
        starts=np.array(tokens.starts, dtype=np.int32),
        contexts=np.array(tokens.contexts, dtype=np.int32),
        window_tables=None if windowed is None else _block_tables(windowed),
    )
    present = arrays.present()
    on_host = device.type == "cpu"
    tensors = map(torch.from_numpy, present) if on_host else upload_together(present, device)
    packed = model_input(arrays.replaced(tensors), 0 if form is None else form.window, names)
    if states and packed.states is None:
        packed = replace(packed, states=StateRows(tokens.starts, states, device))
    return replace(packed, sampled=sampled, prompt_rows=prompt_rows)


class _Tokens(NamedTuple):
    """A batch's tokens as lists.

    `input_ids`, `positions` and `slots` have an entry per token; `starts` and `contexts` an entry
    per sequence, and `starts` the number of tokens as its last.
    """

    input_ids: list[int]
    positions: list[int]
    slots: list[int]
    starts: list[int]
    contexts: list[int]


class _Places(NamedTuple):
    """Block tables of a kind of layers, by sequence, and where blocks are in a layer's tensor.

    A block has `block_size` tokens, and is number `distance` times its id in the tensor.
    """

    tables: list[array[int]]
    block_size: int
    distance: int = 1


def _places(
    batch: ScheduledBatch, block_size: int, form: BlockForm | None
) -> tuple[_Places, _Places | None]:
    """The blocks of all layers, or those with a window apart."""
    if form is None:
        return _Places([s.block_table for s in batch.num_tokens], block_size), None
    tables = [s.window_table for s in batch.num_tokens]
    windowed = _Places(tables, form.block_size, form.window_places)
    if not form.ratio:
        return windowed, None
    tables = [s.block_table for s in batch.num_tokens]
    return _Places(tables, form.whole_size, form.whole_places), windowed


def _concatenated(batch: ScheduledBatch, places: _Places) -> _Tokens:
    """The tokens of all sequences, one sequence after the other, draft tokens included."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    size, distance = places.block_size, places.block_size * places.distance
    for (sequence, num_tokens), table in zip(batch.num_tokens.items(), places.tables, strict=True):
        first = sequence.num_computed_tokens
        end = first + num_tokens
        input_ids += sequence.token_ids[first:end]
        input_ids += sequence.draft_ids
        positions += _positions(sequence, first, end)
        slots += _slots(table, first, end, size, distance)
        starts.append(starts[-1] + num_tokens)
        contexts.append(end)
    return _Tokens(input_ids, positions, slots, starts, contexts)


def _positions(sequence: Sequence, first: int, end: int) -> Iterable[int]:
    """The positions of a sequence's tokens; those of a prompt with images may have others yet."""
    delta = sequence.position_delta
    if not delta:
        return range(first, end)
    begun = max(first, sequence.num_prompt_tokens)
    return itertools.chain(range(first, min(end, begun)), range(begun + delta, end + delta))


def _all_slots(batch: ScheduledBatch, places: _Places) -> NDArray[np.int64]:
    """The cache slots of all tokens, one sequence after the other."""
    size, distance = places.block_size, places.block_size * places.distance
    slots: list[int] = []
    for (sequence, num_tokens), table in zip(batch.num_tokens.items(), places.tables, strict=True):
        first = sequence.num_computed_tokens
        slots += _slots(table, first, first + num_tokens, size, distance)
    return np.array(slots, dtype=np.int64)


def _slots(table: array[int], first: int, end: int, block_size: int, distance: int) -> list[int]:
    """The cache slots of the positions from `first` to `end - 1`.

    Blocks are `distance` slots apart.
    """
    index, offset = divmod(first, block_size)
    if end == first + 1:  # a decoding sequence: the usual case
        return [table[index] * distance + offset]
    starts = [block * distance for block in table[index : -(-end // block_size)]]
    slots = [slot for start in starts for slot in range(start, start + block_size)]
    return slots[offset : offset + end - first]


def _block_tables(places: _Places) -> NDArray[np.int32]:
    """Int32 [num_seqs, max_blocks], padded with 0."""
    tables = [table.tobytes() for table in places.tables]
    width = max(map(len, tables))
    padded = bytearray().join([table.ljust(width, b"\0") for table in tables])  # zeros
    packed = np.frombuffer(padded, dtype=np.int32).reshape(len(tables), -1)
    return packed if places.distance == 1 else packed * np.int32(places.distance)


def _logits_rows(
    batch: ScheduledBatch, starts: list[int]
) -> tuple[list[int], dict[Sequence, range], list[PromptRows]]:
    """The tokens whose logits are wanted, and which of these rows are sampled or of a prompt."""
    rows: list[int] = []
    sampled: dict[Sequence, range] = {}
    prompt_rows: list[PromptRows] = []
    for (sequence, num_tokens), start in zip(batch.num_tokens.items(), starts, strict=False):
        first = sequence.num_computed_tokens
        end = first + num_tokens
        if sequence.request.prompt_logprobs and first < sequence.num_prompt_tokens:
            targets = sequence.token_ids[first + 1 : min(end + 1, sequence.num_prompt_tokens)]
            prompt_rows.append(PromptRows(sequence, len(rows), targets))
            rows += range(start, start + len(targets))
        num_drafts = len(sequence.draft_ids)
        if end == sequence.num_tokens + num_drafts:
            sampled[sequence] = range(len(rows), len(rows) + 1 + num_drafts)
            rows += range(start + num_tokens - 1 - num_drafts, start + num_tokens)
    return rows, sampled, prompt_rows


def _adapter_rows(
    batch: ScheduledBatch, starts: list[int]
) -> tuple[tuple[str, ...], list[int], list[int]]:
    """The adapters of a batch, the tokens that have one, and which it is of these."""
    names: dict[str, int] = {}
    rows: list[int] = []
    owners: list[int] = []
    for (sequence, num_tokens), start in zip(batch.num_tokens.items(), starts, strict=False):
        if name := sequence.request.adapter:
            rows += range(start, start + num_tokens)
            owners += [names.setdefault(name, len(names))] * num_tokens
    return (*names,), rows, owners


def _states(batch: ScheduledBatch) -> list[SequenceState]:
    """The states of all sequences of a batch; none of a model without such."""
    return [
        _state(sequence, sequence.state_slot, num_tokens)
        for sequence, num_tokens in batch.num_tokens.items()
        if sequence.state_slot is not None
    ]


def _decoding_slots(states: list[SequenceState], num_tokens: int) -> NDArray[np.int64] | None:
    """The slots in a step with one token of each sequence, if nothing else becomes of states."""
    if not states or len(states) != num_tokens:
        return None
    if any(state != SequenceState(state.slot, begins=False) for state in states):
        return None
    return np.array([state.slot for state in states], dtype=np.int64)


def _state(sequence: Sequence, slot: int, num_tokens: int) -> SequenceState:
    first = sequence.num_computed_tokens
    copies = [(position - first, copy) for position, copy in sequence.state_copies]
    return SequenceState(
        slot,
        first == 0,
        sequence.state_source,
        tuple(copy for copy in copies if 0 < copy[0] <= num_tokens),
        tuple(sequence.draft_slots),
    )
