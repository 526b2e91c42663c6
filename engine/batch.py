"""A step's work as tensors.

The tokens of all sequences are concatenated, whether a sequence prefills or decodes::

    sequence          A (decode)   B (prefill, 3 of 5 tokens)   C (decode)
    input_ids       [ a9         | b0  b1  b2                 | c4 ]    num_tokens = 5
    positions       [ 9          | 0   1   2                  | 4  ]
    query_start_loc [ 0            1                            4    5 ]
    context_lens    [ 10           3                            5  ]    tokens cached after the step
    logits_rows     [ 0                                         4  ]    B gets no token yet
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_form import BlockForm
from .scheduling.scheduler import ScheduledBatch
from .scheduling.sequence import Sequence
from .transfer import upload

ALIGNMENT = 64  # bytes
_Integers = NDArray[np.int64] | NDArray[np.int32]
_FORMATS = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class WindowInput(NamedTuple):
    """Where the tokens of layers with a window are, if these have blocks of their own.

    `window` is the largest window of such a layer. `slot_mapping` and `block_tables` are as those
    of `AttentionInput`; blocks that no token of the step sees are 0.
    """

    window: int
    slot_mapping: Tensor
    block_tables: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What attention needs in addition to query, key and value.

    `slot_mapping` int64 [num_tokens]: the slot of a token's key and value in the cache, block *
    block_size + offset. `block_tables` int32 [num_seqs, max_blocks], padded with 0.
    `query_start_loc` int32 [num_seqs + 1]: where each sequence's tokens start. `context_lens` int32
    [num_seqs]: the tokens of each sequence in the cache, this step's included. `window` is for
    layers with a window, if they do not use the same slots as the others.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    window: WindowInput | None = None


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The rows of logits that give a prompt's log-probabilities.

    Row `start + i` of the logits belongs to the prompt token `target_ids[i]` that follows it.
    """

    sequence: Sequence
    start: int
    target_ids: list[int]


class AdapterRows(NamedTuple):
    """The tokens of sequences that have an adapter.

    `rows` int64 [num_rows]: which of the step's tokens; None for all. `owners` int64 [num_rows]:
    the adapter of each, an index into `names`, which are digests; without names, its slot on the
    device, and -1 for none.
    """

    rows: Tensor | None
    owners: Tensor
    names: tuple[str, ...] = ()


class SequenceState(NamedTuple):
    """The state of a sequence in a step.

    `slot` is where it is; `begins` says that it is empty yet. `source` is the slot of one that was
    kept, if the sequence goes on from there. `copies` are slots in which the state is kept for
    others, each with the number of the sequence's tokens in the step after which it is. `drafts`
    are slots for the states before each draft token.
    """

    slot: int
    begins: bool
    source: int | None = None
    copies: tuple[tuple[int, int], ...] = ()
    drafts: tuple[int, ...] = ()


class StateRows(NamedTuple):
    """The sequences of a step, for layers that compute each with its own state; on the host.

    `starts` [num_seqs + 1]: where each sequence's tokens start. `sequences` [num_seqs]. `device` is
    that of the step's tensors. `decoding` int64 [num_seqs], on that device, are the slots in a step
    in which every sequence has one token, and nothing else becomes of its state.
    """

    starts: list[int]
    sequences: list[SequenceState]
    device: torch.device
    decoding: Tensor | None = None


class Span(NamedTuple):
    """Tokens of an image that see each other, the later ones included.

    They are the rows `row` … `row + length - 1` of a step, of the sequence with this index in it,
    whose positions end before `end`.
    """

    sequence: int
    row: int
    length: int
    end: int


class ImageRows(NamedTuple):
    """The tokens of a step whose embeddings come from images.

    `rows` int64 [num_rows]: which of the step's tokens. `embeddings` [num_rows, hidden_size] are
    theirs; `deepstack` has what some models add to their hidden states after the first layers.
    `positions` int64 [3, num_tokens]: those of all tokens of the step, for models that have three
    per token and a prompt with images in the step. `spans` are the tokens that see each other, in
    models whose attention over an image goes in both directions.
    """

    rows: Tensor
    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()
    positions: Tensor | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The input of one forward pass.

    `input_ids` and `positions` int64 [num_tokens]; `logits_rows` int64 [num_rows]: the tokens whose
    logits are wanted. `sampled` says which rows of the logits a sequence's next tokens are sampled
    from: one row, and one more for each draft token. `adapters` is None if no sequence has one,
    `states` if the model has no state beside the KV cache, and `images` in a step without any.
    `previous` int64 [sampled rows of the previous step] is on the device: the tokens that ids below
    0 stand for, if there are such; see `filled`.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionInput
    logits_rows: Tensor
    sampled: dict[Sequence, range]
    prompt_rows: list[PromptRows]
    adapters: AdapterRows | None = None
    states: StateRows | None = None
    images: ImageRows | None = None
    previous: Tensor | None = None

    def filled(self, previous: Tensor) -> ModelInput:
        """The same with the previous step's tokens in place of ids that stand for them."""
        return replace(
            self, input_ids=_without_placeholders(self.input_ids, previous), previous=None
        )


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
    arrays: list[_Integers] = [
        np.array(tokens.input_ids, dtype=np.int64),
        np.array(tokens.positions, dtype=np.int64),
        np.array(tokens.slots, dtype=np.int64),
        np.array(rows, dtype=np.int64),
        _block_tables(places),
        np.array(tokens.starts, dtype=np.int32),
        np.array(tokens.contexts, dtype=np.int32),
    ]
    names, adapted = _adapter_rows(batch, tokens.starts)
    arrays += adapted
    if windowed is not None:
        arrays += [np.array(_all_slots(batch, windowed), dtype=np.int64), _block_tables(windowed)]
    on_host = device.type == "cpu"
    tensors = map(torch.from_numpy, arrays) if on_host else upload_together(arrays, device)
    input_ids, positions, slot_mapping, logits_rows, tables, start_loc, context_lens, *rest = (
        tensors
    )
    window = None
    if windowed is not None and form is not None:
        window = WindowInput(form.window, *rest[-2:])
    return ModelInput(
        input_ids=input_ids,
        positions=positions,
        attention=AttentionInput(
            slot_mapping=slot_mapping,
            block_tables=tables,
            query_start_loc=start_loc,
            context_lens=context_lens,
            window=window,
        ),
        logits_rows=logits_rows,
        sampled=sampled,
        prompt_rows=prompt_rows,
        adapters=AdapterRows(rest[0], rest[1], names) if names else None,
        states=_state_rows(batch, tokens.starts, device),
    )


class TableWidths(NamedTuple):
    """Blocks of the longest sequence, as its tables have them.

    `windowed` is the width of the table for layers with a window; None if they have none of their
    own. `window` is the largest window of these.
    """

    whole: int
    windowed: int | None = None
    window: int = 0

    @classmethod
    def of(cls, num_tokens: int, block_size: int, form: BlockForm | None) -> TableWidths:
        """The widths for a sequence of this many tokens."""
        blocks = -(-num_tokens // block_size)
        if form is None or not form.ratio:
            return cls(blocks)
        return cls(form.num_whole(num_tokens), blocks, form.window)

    def fit(self, attention: AttentionInput) -> bool:
        """Whether a step's tables are no wider."""
        windowed = attention.window
        return attention.block_tables.shape[1] <= self.whole and (
            windowed is None or windowed.block_tables.shape[1] <= (self.windowed or 0)
        )


def blank(
    num_tokens: int, num_seqs: int, num_rows: int, widths: TableWidths, device: torch.device
) -> ModelInput:
    """Zeros, into which batches are copied for recorded steps, which read fixed addresses."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    window = None
    if widths.windowed is not None:
        slots = zeros(num_tokens, dtype=torch.int64)
        tables = zeros(num_seqs, widths.windowed, dtype=torch.int32)
        window = WindowInput(widths.window, slots, tables)
    return ModelInput(
        input_ids=zeros(num_tokens, dtype=torch.int64),
        positions=zeros(num_tokens, dtype=torch.int64),
        attention=AttentionInput(
            slot_mapping=zeros(num_tokens, dtype=torch.int64),
            block_tables=zeros(num_seqs, widths.whole, dtype=torch.int32),
            query_start_loc=zeros(num_seqs + 1, dtype=torch.int32),
            context_lens=zeros(num_seqs, dtype=torch.int32),
            window=window,
        ),
        logits_rows=zeros(num_rows, dtype=torch.int64),
        sampled={},
        prompt_rows=[],
    )


def copy_rows(rows: ModelInput, batch: ModelInput) -> None:
    """Copies a batch's tokens and sequences into the first rows of a batch at least as large."""
    source, target = batch.attention, rows.attention
    num_tokens, num_seqs = len(batch.input_ids), len(source.context_lens)
    rows.input_ids[:num_tokens].copy_(batch.input_ids)
    rows.positions[:num_tokens].copy_(batch.positions)
    target.slot_mapping[:num_tokens].copy_(source.slot_mapping)
    target.context_lens[:num_seqs].copy_(source.context_lens)
    num_blocks = source.block_tables.shape[1]
    target.block_tables[:num_seqs, :num_blocks].copy_(source.block_tables)
    if source.window is not None and target.window is not None:
        _, slots, tables = source.window
        target.window.slot_mapping[:num_tokens].copy_(slots)
        target.window.block_tables[:num_seqs, : tables.shape[1]].copy_(tables)


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


def _without_placeholders(input_ids: Tensor, sampled_ids: Tensor) -> Tensor:
    """Replaces ids below 0 by the tokens they stand for: see `Sequence.append_placeholder`."""
    sampled = sampled_ids[(-1 - input_ids).clamp(min=0)]
    return torch.where(input_ids < 0, sampled, input_ids)


def _all_slots(batch: ScheduledBatch, places: _Places) -> list[int]:
    """The cache slots of all tokens, one sequence after the other."""
    size, distance = places.block_size, places.block_size * places.distance
    slots: list[int] = []
    for (sequence, num_tokens), table in zip(batch.num_tokens.items(), places.tables, strict=True):
        first = sequence.num_computed_tokens
        slots += _slots(table, first, first + num_tokens, size, distance)
    return slots


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
) -> tuple[tuple[str, ...], list[_Integers]]:
    """The adapters of a batch, and the two arrays of `AdapterRows`; nothing if there are none."""
    names: dict[str, int] = {}
    rows: list[int] = []
    owners: list[int] = []
    for (sequence, num_tokens), start in zip(batch.num_tokens.items(), starts, strict=False):
        if name := sequence.request.adapter:
            rows += range(start, start + num_tokens)
            owners += [names.setdefault(name, len(names))] * num_tokens
    if not names:
        return (), []
    return (*names,), [np.array(rows, dtype=np.int64), np.array(owners, dtype=np.int64)]


def _state_rows(batch: ScheduledBatch, starts: list[int], device: torch.device) -> StateRows | None:
    states = [
        _state(sequence, sequence.state_slot, num_tokens)
        for sequence, num_tokens in batch.num_tokens.items()
        if sequence.state_slot is not None
    ]
    if not states:  # all have one, or none has
        return None
    decoding = None
    if len(states) == starts[-1] and all(
        state == SequenceState(state.slot, begins=False) for state in states
    ):
        decoding = upload([state.slot for state in states], device)
    return StateRows(starts, states, device, decoding)


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


def uploaded(batch: ModelInput, device: torch.device) -> ModelInput:
    """A batch on the host, copied to a device in one transfer; without states and images."""
    if device.type == "cpu":
        return batch
    step, window, adapters = batch.attention, batch.attention.window, batch.adapters
    tensors = [batch.input_ids, batch.positions, batch.logits_rows, step.slot_mapping]
    tensors += [step.block_tables, step.query_start_loc, step.context_lens]
    tensors += [] if window is None else [window.slot_mapping, window.block_tables]
    if adapters is not None:
        tensors += [it for it in (adapters.owners, adapters.rows) if it is not None]
    moved = upload_together([tensor.numpy() for tensor in tensors], device)
    ids, positions, rows, slots, tables, starts, contexts, *rest = moved
    if window is not None:
        window = WindowInput(window.window, rest.pop(0), rest.pop(0))
    if adapters is not None:
        owners, *which = rest
        adapters = AdapterRows(which[0] if which else None, owners, adapters.names)
    return replace(
        batch,
        input_ids=ids,
        positions=positions,
        attention=AttentionInput(
            slot_mapping=slots,
            block_tables=tables,
            query_start_loc=starts,
            context_lens=contexts,
            window=window,
        ),
        logits_rows=rows,
        adapters=adapters,
    )


def upload_together(arrays: list[_Integers], device: torch.device) -> list[Tensor]:
    """Copies the arrays to the device in one transfer.

    Each starts at a multiple of the longest vector that kernels load: Triton compiles a kernel
    again for pointers that are aligned otherwise.
    """
    sizes = [(values.nbytes // ALIGNMENT + 1) * ALIGNMENT for values in arrays]
    buffer = np.empty(sum(sizes), dtype=np.uint8)
    starts = [*itertools.accumulate(sizes, initial=0)]
    for values, start in zip(arrays, starts, strict=False):
        buffer[start : start + values.nbytes].view(values.dtype)[:] = values.ravel()
    uploaded = upload(buffer, device)
    return [
        uploaded[start : start + values.nbytes].view(_FORMATS[values.dtype]).view(values.shape)
        for values, start in zip(arrays, starts, strict=False)
    ]
