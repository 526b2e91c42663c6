"""Packing a step: every tensor is compared with a loop over tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch.integers import ALIGNMENT, upload_together, uploaded
from engine.batch.model_input import AdapterRows
from engine.batch.packing import pack
from engine.batch.recorded_rows import TableWidths, blank
from engine.protocol.request import Request
from engine.scheduling.scheduler import ScheduledBatch
from engine.scheduling.sequence import Sequence

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """One sequence of a batch: its tokens, and how many of them the step computes."""

    num_prompt: int
    num_generated: int
    num_computed: int
    num_tokens: int
    prompt_logprobs: bool = False


@st.composite
def works(draw: st.DrawFn) -> Work:
    """Any state that a scheduled sequence can be in."""
    num_prompt = draw(st.integers(1, 9))
    num_generated = draw(st.integers(0, 4))
    total = num_prompt + num_generated
    num_computed = draw(st.integers(0, total - 1))
    num_tokens = draw(st.integers(1, total - num_computed))
    return Work(num_prompt, num_generated, num_computed, num_tokens, draw(st.booleans()))


def make_batch(works: list[Work], block_size: int) -> ScheduledBatch:
    """Sequences with distinct token ids, and blocks in descending order."""
    num_tokens: dict[Sequence, int] = {}
    next_block = 50
    for index, work in enumerate(works):
        ids = range(100 * index, 100 * index + work.num_prompt + work.num_generated)
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple(ids[: work.num_prompt]),
            resumed_token_ids=tuple(ids[work.num_prompt :]),
            max_new_tokens=99,
            prompt_logprobs=work.prompt_logprobs,
        )
        sequence = Sequence(request)
        sequence.num_computed_tokens = work.num_computed
        num_blocks = -(-(work.num_computed + work.num_tokens) // block_size)
        sequence.block_table = array("i", [next_block - i for i in range(num_blocks)])
        next_block -= num_blocks
        num_tokens[sequence] = work.num_tokens
    return ScheduledBatch(num_tokens)


@settings(deadline=None)
@given(st.lists(works(), min_size=1, max_size=5), st.sampled_from([1, 3, 16]))
def test_tensors_match_a_loop_over_tokens(todo: list[Work], block_size: int) -> None:
    batch = make_batch(todo, block_size)
    packed = pack(batch, block_size, CPU)

    input_ids, positions, slots, starts, contexts = [], [], [], [0], []
    for sequence, num_tokens in batch.num_tokens.items():
        for offset in range(num_tokens):
            position = sequence.num_computed_tokens + offset
            block = sequence.block_table[position // block_size]
            input_ids.append(sequence.token_ids[position])
            positions.append(position)
            slots.append(block * block_size + position % block_size)
        starts.append(len(input_ids))
        contexts.append(sequence.num_computed_tokens + num_tokens)
    attention = packed.attention
    assert packed.input_ids.tolist() == input_ids
    assert packed.positions.tolist() == positions
    assert attention.slot_mapping.tolist() == slots
    assert attention.query_start_loc.tolist() == starts
    assert attention.context_lens.tolist() == contexts
    widest = max(len(sequence.block_table) for sequence in batch.num_tokens)
    assert attention.block_tables.tolist() == [
        [*sequence.block_table] + [0] * (widest - len(sequence.block_table))
        for sequence in batch.num_tokens
    ]


@settings(deadline=None)
@given(st.lists(works(), min_size=1, max_size=5))
def test_rows_match_a_loop_over_tokens(todo: list[Work]) -> None:
    batch = make_batch(todo, 4)
    packed = pack(batch, 4, CPU)
    row_tokens = [int(packed.input_ids[row]) for row in packed.logits_rows]

    sampled = [s for s, n in batch.num_tokens.items() if s.num_computed_tokens + n == s.num_tokens]
    assert list(packed.sampled) == sampled
    for sequence, rows in packed.sampled.items():
        (row,) = rows
        assert row_tokens[row] == sequence.token_ids[-1], "the last token's logits give the next"

    by_sequence = {rows.sequence: rows for rows in packed.prompt_rows}
    num_rows = len(sampled)
    for sequence, num_tokens in batch.num_tokens.items():
        targets = []
        if sequence.request.prompt_logprobs:
            first = sequence.num_computed_tokens
            for position in range(first, first + num_tokens):
                if position + 1 < sequence.num_prompt_tokens:
                    targets.append(sequence.token_ids[position + 1])
        wanted = by_sequence.get(sequence)
        assert (wanted.target_ids if wanted is not None else []) == targets
        if wanted is not None:
            # Token ids are consecutive, so a target's row is that of the id before it.
            span = row_tokens[wanted.start : wanted.start + len(targets)]
            assert span == [target - 1 for target in targets]
        num_rows += len(targets)
    assert len(row_tokens) == num_rows, "only logits that are wanted"


def test_the_example_in_the_modules_docstring() -> None:
    batch = make_batch([Work(5, 5, 9, 1), Work(5, 0, 0, 3), Work(3, 2, 4, 1)], 4)
    packed = pack(batch, 4, CPU)
    assert packed.positions.tolist() == [9, 0, 1, 2, 4]
    assert packed.attention.query_start_loc.tolist() == [0, 1, 4, 5]
    assert packed.attention.context_lens.tolist() == [10, 3, 5]
    assert packed.logits_rows.tolist() == [0, 4]
    assert [list(rows) for rows in packed.sampled.values()] == [[0], [1]]


def test_types_are_those_that_kernels_expect() -> None:
    packed = pack(make_batch([Work(3, 0, 0, 3)], 4), 4, CPU)
    int64 = (packed.input_ids, packed.positions, packed.logits_rows, packed.attention.slot_mapping)
    attention = packed.attention
    int32 = (attention.block_tables, attention.query_start_loc, attention.context_lens)
    assert {tensor.dtype for tensor in int64} == {torch.int64}
    assert {tensor.dtype for tensor in int32} == {torch.int32}
    assert all(tensor.is_contiguous() for tensor in (*int64, *int32))


def test_a_step_without_a_finished_prompt_wants_no_logits() -> None:
    packed = pack(make_batch([Work(9, 0, 0, 4)], 4), 4, CPU)
    assert packed.logits_rows.tolist() == []
    assert packed.sampled == {}


def test_draft_tokens_follow_the_last_token_and_each_has_a_row() -> None:
    batch = make_batch([Work(3, 2, 4, 1), Work(5, 0, 0, 2)], 4)
    drafting = next(iter(batch.num_tokens))
    drafting.draft_ids = [90, 91]
    batch.num_tokens[drafting] += 2
    drafting.block_table.extend([7] * 2)
    packed = pack(batch, 4, CPU)
    assert packed.input_ids.tolist()[:3] == [drafting.token_ids[-1], 90, 91]
    assert packed.positions.tolist() == [4, 5, 6, 0, 1]
    assert packed.attention.context_lens.tolist() == [7, 2]
    assert packed.logits_rows.tolist() == [0, 1, 2]
    assert [list(rows) for rows in packed.sampled.values()] == [[0, 1, 2]]


@given(
    arrays=st.lists(
        st.tuples(st.lists(st.integers(0, 2**30), max_size=20), st.booleans()), min_size=1
    )
)
def test_arrays_that_are_copied_together_keep_their_values(
    arrays: list[tuple[list[int], bool]],
) -> None:
    given = [np.array(values, dtype=np.int64 if wide else np.int32) for values, wide in arrays]
    copies = upload_together(given, CPU)
    for copy, values in zip(copies, given, strict=True):
        assert copy.numpy().dtype == values.dtype
        assert copy.tolist() == values.tolist()
        assert copy.storage_offset() * copy.itemsize % ALIGNMENT == 0


def test_a_batch_on_the_host_is_uploaded_in_its_shapes() -> None:
    """To a device without memory, which stands for one with another."""
    names = ("input_ids", "positions", "logits_rows")
    attention = ("slot_mapping", "block_tables", "query_start_loc", "context_lens")
    for rows in (None, torch.tensor([1, 2])):
        adapters = AdapterRows(rows, torch.zeros(3 if rows is None else 2, dtype=torch.int64))
        host = replace(
            blank(3, 2, 1, TableWidths(5, 4, 16), torch.device("cpu")), adapters=adapters
        )
        moved = uploaded(host, torch.device("meta"))
        pairs = [(getattr(moved, name), getattr(host, name)) for name in names]
        pairs += [(getattr(moved.attention, it), getattr(host.attention, it)) for it in attention]
        assert moved.attention.window is not None
        assert host.attention.window is not None
        pairs += zip(moved.attention.window[1:], host.attention.window[1:], strict=True)
        assert moved.adapters is not None
        pairs.append((moved.adapters.owners, adapters.owners))
        assert (moved.adapters.rows is None) == (rows is None)
        assert moved.attention.window.window == 16
        for there, here in pairs:
            assert there.device.type == "meta"
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
