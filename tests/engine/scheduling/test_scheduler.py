"""Scheduling: budgets and the order hold, every sequence finishes, and no block is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.protocol.errors import CapacityError
from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import ScheduledBatch, Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus

BLOCK_SIZE = 2
LOGPROB_ROWS = 3


def make_scheduler(
    *,
    num_blocks: int = 16,
    max_step_tokens: int = 64,
    max_num_seqs: int = 8,
    max_chunk_tokens: int | None = None,
    min_chunk_tokens: int | None = None,
) -> Scheduler:
    """A scheduler over small blocks."""
    return Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE),
        max_step_tokens=max_step_tokens,
        max_num_seqs=max_num_seqs,
        max_chunk_tokens=max_chunk_tokens,
        min_chunk_tokens=min_chunk_tokens,
        max_logprob_rows=LOGPROB_ROWS,
    )


def make_sequence(
    prompt: list[int], *, max_new_tokens: int = 4, prompt_logprobs: bool = False
) -> Sequence:
    """A sequence with this prompt."""
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            max_new_tokens=max_new_tokens,
            prompt_logprobs=prompt_logprobs,
        )
    )


def compute(scheduler: Scheduler, batch: ScheduledBatch) -> list[Sequence]:
    """Completes a batch as the engine does; a token's id is its position.

    Returns:
        The finished sequences.
    """
    scheduler.advance(batch)
    finished = []
    for sequence in batch.num_tokens:
        if not sequence.num_pending_tokens and sequence.append(sequence.num_tokens) is not None:
            scheduler.finish(sequence)
            finished.append(sequence)
    return finished


def steps_alone(scheduler: Scheduler, sequence: Sequence) -> int:
    """The most steps that a sequence takes once it is the oldest."""
    cap = min(scheduler.max_step_tokens, scheduler.max_chunk_tokens)
    if sequence.request.prompt_logprobs:
        cap = min(cap, scheduler.max_logprob_rows)
    return -(-sequence.max_tokens // cap) + sequence.request.max_new_tokens


def check_batch(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """Asserts what holds for every batch."""
    assert batch.total_tokens <= scheduler.max_step_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert set(batch.num_tokens) <= set(scheduler.running)
    for sequence, num_tokens in batch.num_tokens.items():
        assert 1 <= num_tokens <= sequence.num_pending_tokens
        if sequence.request.prompt_logprobs:
            assert num_tokens <= scheduler.max_logprob_rows
        end = sequence.num_computed_tokens + num_tokens
        assert len(sequence.block_table) * BLOCK_SIZE >= end
    written = [
        sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for sequence, num_tokens in batch.num_tokens.items()
        for position in range(
            sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        )
    ]
    assert len(written) == len(set(written)), "two tokens would go to one slot"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, and are aborted in any state, under budgets drawn at the start."""

    @initialize(
        num_blocks=st.integers(2, 12),
        max_step_tokens=st.integers(1, 9),
        max_seqs=st.integers(1, 5),
        max_chunk_tokens=st.none() | st.integers(1, 5),
    )
    def start(
        self, num_blocks: int, max_step_tokens: int, max_seqs: int, max_chunk_tokens: int | None
    ) -> None:
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            max_step_tokens=max_step_tokens,
            max_num_seqs=max_seqs,
            max_chunk_tokens=max_chunk_tokens,
        )
        self.arrived: list[Sequence] = []  # in order, without finished ones

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_new_tokens=st.integers(1, 10),
        prompt_logprobs=st.integers(0, 4).map(lambda n: n == 0),
    )
    def add(self, prompt: list[int], max_new_tokens: int, prompt_logprobs: bool) -> None:
        sequence = make_sequence(
            prompt, max_new_tokens=max_new_tokens, prompt_logprobs=prompt_logprobs
        )
        # The last token is never computed.
        if sequence.max_tokens - 1 <= self.scheduler.blocks.num_blocks * BLOCK_SIZE:
            self.scheduler.add(sequence)
            self.arrived.append(sequence)
        else:
            with pytest.raises(CapacityError):
                self.scheduler.add(sequence)

    @rule()
    def step(self) -> None:
        had_work = self.scheduler.has_work
        any_decoding = any(s.num_pending_tokens == 1 for s in self.scheduler.running)
        batch = self.scheduler.schedule()
        if any_decoding:
            assert batch.num_prefill_tokens <= self.scheduler.max_chunk_tokens
        check_batch(self.scheduler, batch)
        assert bool(batch.num_tokens) == had_work
        if had_work:
            assert self.arrived[0] in batch.num_tokens, "the oldest always goes on"
        for sequence in compute(self.scheduler, batch):
            self.arrived.remove(sequence)

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.arrived))
        self.scheduler.finish(sequence)
        self.scheduler.finish(sequence)  # a second time does nothing
        assert not sequence.block_table
        self.arrived.remove(sequence)

    @invariant()
    def order_and_block_tables_are_kept(self) -> None:
        if hasattr(self, "scheduler"):
            living = [*self.scheduler.running, *self.scheduler.waiting]
            assert living == self.arrived
            assert not any(sequence.block_table for sequence in self.scheduler.waiting)
            self.scheduler.blocks.check_integrity(living)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        bound = sum(steps_alone(self.scheduler, sequence) for sequence in self.arrived)
        expected = [sequence.max_tokens for sequence in self.arrived]
        sequences = list(self.arrived)
        for _ in range(bound):
            self.step()
        assert not self.scheduler.has_work, "a sequence starves"
        assert [sequence.num_tokens for sequence in sequences] == expected
        assert self.scheduler.blocks.num_free_blocks == self.scheduler.blocks.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    sequence = make_sequence(list(range(10)))
    scheduler.add(sequence)

    chunks = []
    while sequence.num_generated_tokens == 0:
        batch = scheduler.schedule()
        chunks.append(batch.num_tokens[sequence])
        compute(scheduler, batch)
    assert chunks == [4, 4, 2]


def test_decoding_sequences_continue_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    decoding, long = make_sequence([1, 2]), make_sequence(list(range(10)))
    scheduler.add(decoding)
    compute(scheduler, scheduler.schedule())
    scheduler.add(long)

    batch = scheduler.schedule()
    assert batch.num_tokens == {decoding: 1, long: 3}
    assert batch.total_tokens == 4
    assert batch.num_prefill_tokens == 3


def test_prompts_take_at_most_a_chunk_of_a_step_that_also_decodes() -> None:
    scheduler = make_scheduler(num_blocks=40, max_step_tokens=20, max_chunk_tokens=3)
    decoding, other = make_sequence([1] * 2, max_new_tokens=9), make_sequence([2] * 12)
    scheduler.add(decoding)
    scheduler.add(other)
    batch = scheduler.schedule()
    assert batch.num_tokens == {decoding: 2, other: 12}  # no sequence decodes
    compute(scheduler, batch)
    scheduler.finish(other)

    long, late = make_sequence([3] * 4), make_sequence([4] * 5)
    scheduler.add(long)
    scheduler.add(late)
    plans = []
    for _ in range(3):
        batch = scheduler.schedule()
        plans.append(batch.num_tokens)
        compute(scheduler, batch)
    assert plans == [
        {decoding: 1, long: 3},
        {decoding: 1, long: 1, late: 3},
        {decoding: 1, long: 1, late: 2},
    ]


def test_prompt_with_logprobs_is_computed_in_smaller_chunks() -> None:
    scheduler = make_scheduler()
    wants, other = make_sequence([1] * 8, prompt_logprobs=True), make_sequence([2] * 8)
    scheduler.add(wants)
    scheduler.add(other)

    assert scheduler.schedule().num_tokens == {wants: LOGPROB_ROWS, other: 8}


def test_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence([1, 2, 3, 4, 5]), make_sequence([1, 2, 3, 4, 9])
    scheduler.add(first)
    compute(scheduler, scheduler.schedule())
    scheduler.add(second)

    assert scheduler.schedule().num_tokens[second] == 1
    assert second.num_cached_tokens == 4


def test_smaller_requests_do_not_overtake_a_large_one() -> None:
    scheduler = make_scheduler(num_blocks=8)
    running, large, small = make_sequence([1] * 10), make_sequence([2] * 12), make_sequence([3])
    for sequence in (running, large, small):
        scheduler.add(sequence)

    assert list(scheduler.schedule().num_tokens) == [running]
    assert list(scheduler.waiting) == [large, small]


def test_full_cache_preempts_the_youngest_and_loses_nothing() -> None:
    scheduler = make_scheduler(num_blocks=6)
    old, young = (make_sequence([first] * 3, max_new_tokens=8) for first in (1, 2))
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_preemptions:
        compute(scheduler, scheduler.schedule())

    assert young.num_preemptions == 1
    assert old.num_preemptions == 0
    assert young.status is SequenceStatus.WAITING
    known = list(young.token_ids)
    assert len(known) > 3
    while scheduler.has_work:
        compute(scheduler, scheduler.schedule())
    assert young.token_ids[: len(known)] == known
    assert young.num_generated_tokens == old.num_generated_tokens == 8


@pytest.mark.parametrize("num_forced", range(2, 6))
def test_tokens_that_a_grammar_forces_get_blocks(num_forced: int) -> None:
    scheduler = make_scheduler()
    sequence = make_sequence([1, 2, 3], max_new_tokens=20)
    scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    for number in range(num_forced - 1):
        sequence.append(number)
    batch = scheduler.schedule()
    assert batch.num_tokens == {sequence: num_forced}
    check_batch(scheduler, batch)
    assert len(sequence.block_table) == scheduler.blocks.num_blocks_for(sequence.num_tokens)


def test_forced_tokens_that_fill_the_cache_preempt_and_lose_nothing() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old, young = (make_sequence([number, 2, 3], max_new_tokens=5) for number in (1, 9))
    scheduler.add(old)
    scheduler.add(young)
    compute(scheduler, scheduler.schedule())
    old.append(7)
    old.append(8)
    batch = scheduler.schedule()
    assert batch.num_tokens == {old: 3}
    assert young.status is SequenceStatus.WAITING
    while scheduler.has_work:
        compute(scheduler, scheduler.schedule())
    assert young.num_tokens == 3 + 5


def test_admission_leaves_every_running_sequence_a_block() -> None:
    scheduler = make_scheduler(num_blocks=4)
    running, next_one = make_sequence([1, 1]), make_sequence([2] * 6, max_new_tokens=1)
    scheduler.add(running)
    compute(scheduler, scheduler.schedule())
    scheduler.add(next_one)

    assert list(scheduler.schedule().num_tokens) == [running]


def test_request_larger_than_the_cache_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence([1] * 5, max_new_tokens=4))  # 9 tokens, the last never computed
    with pytest.raises(CapacityError, match="10 tokens do not fit into a KV cache of 4 blocks"):
        scheduler.add(make_sequence([1] * 5, max_new_tokens=5))
    assert len(scheduler.waiting) == 1


@given(st.integers(1, 30), st.integers(1, 30))
def test_every_accepted_request_finishes_alone(num_prompt: int, max_new_tokens: int) -> None:
    scheduler = make_scheduler(num_blocks=10, max_step_tokens=7)
    sequence = make_sequence([1] * num_prompt, max_new_tokens=max_new_tokens)
    try:
        scheduler.add(sequence)
    except CapacityError:
        assert sequence.max_tokens > 20
        return
    for _ in range(steps_alone(scheduler, sequence)):
        compute(scheduler, scheduler.schedule())
    assert sequence.status is SequenceStatus.FINISHED
    assert sequence.num_preemptions == 0
