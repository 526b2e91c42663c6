"""The largest possible steps reach all limits, and can be computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.model_input import ModelInput
from engine.batch.packing import pack
from engine.block_form import BlockForm
from engine.executor import Executor
from engine.memory.worst_step import StepBounds, compute
from engine.sampling.watermark import Watermark
from tests.engine.fakes import CPU

VOCAB_SIZE = 64


@st.composite
def bounds(draw: st.DrawFn) -> StepBounds:
    return StepBounds(
        max_total_tokens=draw(st.integers(2, 80)),
        max_step_tokens=draw(st.integers(1, 120)),
        max_num_seqs=draw(st.integers(1, 40)),
        max_logprob_rows=draw(st.integers(0, 60)),
        max_draft_tokens=draw(st.integers(0, 6)),
        block_size=draw(st.sampled_from([4, 16])),
    )


@given(bounds())
def test_a_step_of_prompts_has_all_tokens_and_the_longest_context(limits: StepBounds) -> None:
    batch = limits.worst_prefill()
    assert batch.total_tokens == limits.max_step_tokens
    packed = pack(batch, limits.block_size, CPU)
    assert packed.attention.context_lens.max() == limits.max_total_tokens - 1
    wanted = sum(len(part.target_ids) for part in packed.prompt_rows)
    full = min(limits.max_logprob_rows, limits.max_step_tokens)
    ends = len(packed.prompt_rows)  # the last token of a prompt has no target
    assert full - ends <= wanted <= full
    assert not packed.attention.slot_mapping.max() >= limits.block_size


@given(bounds())
def test_a_step_of_decoding_has_all_rows_and_the_longest_context(limits: StepBounds) -> None:
    batch = limits.worst_decode()
    count = min(limits.max_num_seqs, limits.max_step_tokens)
    assert len(batch.num_tokens) == count
    drafts = min(limits.max_draft_tokens, limits.max_total_tokens - 2)
    assert batch.total_tokens == min(limits.max_step_tokens, count * (1 + drafts))
    packed = pack(batch, limits.block_size, CPU)
    assert len(packed.logits_rows) == batch.total_tokens
    assert packed.attention.context_lens.max() == limits.max_total_tokens - 1
    assert not packed.attention.slot_mapping.max() >= limits.block_size


@given(bounds())
def test_a_mixed_step_has_all_tokens_and_all_decoding_sequences(limits: StepBounds) -> None:
    batch = limits.worst_mixed()
    assert batch.total_tokens == limits.max_step_tokens
    decode = limits.worst_decode()
    assert len(batch.num_tokens) >= len(decode.num_tokens)
    packed = pack(batch, limits.block_size, CPU)
    assert len(packed.logits_rows) >= decode.total_tokens
    assert not packed.attention.slot_mapping.max() >= limits.block_size


@pytest.mark.parametrize("ratio", [0, 3], ids=["only windows", "both kinds"])
@given(limits=bounds())
def test_steps_of_a_model_with_windows_have_the_longest_tables_of_both_kinds(
    ratio: int, limits: StepBounds
) -> None:
    form = BlockForm(window=9, block_size=limits.block_size, ratio=ratio)
    limits = replace(limits, form=form)
    longest = limits.max_total_tokens - 1
    for batch in (limits.worst_prefill(), limits.worst_decode(), limits.worst_mixed()):
        step = pack(batch, limits.block_size, CPU, form=form).attention
        kinds = [(step.slot_mapping, step.block_tables, form.whole_size or form.block_size)]
        assert (step.window is not None) == bool(ratio)
        if step.window is not None:
            assert step.window.window == 9
            kinds.append((*step.window[1:], form.block_size))
        for slots, tables, size in kinds:
            assert slots.max() < size, "the cache has one block"
            assert tables.shape[1] >= -(-longest // size)
    assert len(pack(limits.greedy(), limits.block_size, CPU, form=form).input_ids) == 1


@given(bounds(), st.integers(1, 40))
def test_a_recorded_step_has_its_tokens_and_the_longest_context(
    limits: StepBounds, num_tokens: int
) -> None:
    plain = pack(limits.recorded(num_tokens, num_tokens), limits.block_size, CPU)
    assert len(plain.input_ids) == len(plain.attention.context_lens) == num_tokens
    assert plain.attention.context_lens.max() == limits.max_total_tokens - 1


@given(bounds(), st.integers(2, 40))
def test_a_recorded_step_with_drafts_has_a_row_for_each_token(
    limits: StepBounds, num_tokens: int
) -> None:
    has_drafts = limits.max_draft_tokens and limits.max_total_tokens > 2
    packed = pack(limits.recorded(num_tokens, num_tokens - 1), limits.block_size, CPU)
    assert len(packed.attention.context_lens) == num_tokens - 1
    assert len(packed.logits_rows) == num_tokens - (not has_drafts)


@given(bounds(), st.integers(3, 200), st.data())
def test_a_recorded_step_with_a_prompt_has_all_its_tokens(
    limits: StepBounds, num_tokens: int, data: st.DataObject
) -> None:
    num_seqs = data.draw(st.integers(1, num_tokens - 2))
    packed = pack(limits.recorded(num_tokens, num_seqs), limits.block_size, CPU)
    assert len(packed.input_ids) == num_tokens
    assert len(packed.attention.context_lens) >= num_seqs
    assert len(packed.logits_rows) >= num_seqs
    assert packed.attention.context_lens.max() == limits.max_total_tokens - 1
    assert not packed.attention.slot_mapping.max() >= limits.block_size


class Model:
    """Random logits; records the number of rows of each batch."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def __call__(self, batch: ModelInput) -> torch.Tensor:
        self.num_rows.append(len(batch.logits_rows))
        return torch.randn(len(batch.logits_rows), VOCAB_SIZE)


LIMITS: dict[str, Any] = {
    "max_total_tokens": 40,
    "max_step_tokens": 30,
    "max_num_seqs": 8,
    "max_logprob_rows": 12,
    "max_draft_tokens": 2,
    "block_size": 16,
}


def test_largest_steps_can_be_computed_with_all_parameters() -> None:
    model = Model()
    limits = StepBounds(**LIMITS)
    executor = Executor(model, CPU, limits.block_size, Watermark(VOCAB_SIZE, CPU))
    compute(executor, limits.worst_decode())
    compute(executor, limits.worst_prefill())
    compute(executor, limits.worst_mixed())
    assert model.num_rows[0] == 24
    assert model.num_rows[2] == 30


def test_a_step_that_fails_raises() -> None:
    def broken(_: ModelInput) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    limits = StepBounds(**LIMITS)
    with pytest.raises(RuntimeError, match="largest step"):
        compute(Executor(broken, CPU, limits.block_size), limits.worst_decode())
