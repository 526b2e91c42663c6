"""Several callers: everyone gets a share, the urgent go first, and nobody starves."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceStatus
from tests.engine.scheduling.test_scheduler import (
    BLOCK_SIZE,
    check_batch,
    compute,
    make_scheduler,
    steps_alone,
)


def of(
    caller: str, num_prompt: int, *, priority: int = 0, max_new_tokens: int = 4, first: int = 0
) -> Sequence:
    """A sequence of a caller; `first` sets its prompt apart from others."""
    prompt = (first, *range(num_prompt - 1))
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=prompt,
            max_new_tokens=max_new_tokens,
            caller=caller,
            priority=priority,
        )
    )


def test_a_long_queue_of_one_caller_does_not_delay_another() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=10)
    hog = [of("hog", 40, first=1000 + index) for index in range(8)]
    for sequence in hog:
        scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    other = of("other", 8)
    scheduler.add(other)
    compute(scheduler, scheduler.schedule())
    assert other.num_generated_tokens == 1


def test_where_several_ask_a_large_prompt_takes_no_more_than_a_chunk_of_a_step() -> None:
    scheduler = make_scheduler(
        num_blocks=400, max_step_tokens=40, max_chunk_tokens=10, min_chunk_tokens=3
    )

    def step() -> int:
        """Tokens of prompts in one step."""
        batch = scheduler.schedule()
        num_tokens = batch.num_prefill_tokens
        compute(scheduler, batch)
        return num_tokens

    scheduler.add(of("hog", 100, first=1))
    assert step() == 40
    scheduler.add(of("modest", 5, max_new_tokens=1))
    # The modest caller is done after two of them, and may soon be back.
    assert [step() for _ in range(4)] == [5, 5, 5, 5]
    scheduler.add(of("modest", 2, max_new_tokens=1))
    assert [step() for _ in range(2)] == [2, 3]  # nothing delays the end of a prompt
    scheduler.add(of("modest", 30, max_new_tokens=1))
    assert [step() for _ in range(2)] == [10, 10]


def test_a_prompt_that_ends_in_a_step_does_not_wait_for_a_part_of_another_callers() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=20, min_chunk_tokens=10)
    long, other_long = of("hog", 60, first=1), of("hog", 60, first=2)
    for sequence in (long, other_long):
        scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    short, third = of("modest", 4, first=3), of("third", 3, first=4)
    for sequence in (short, third):
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch.num_tokens == {short: 4, third: 3}  # and nothing of a prompt that goes on
    compute(scheduler, batch)
    scheduler.finish(short)
    scheduler.finish(third)
    assert set(scheduler.schedule().num_tokens) <= {long, other_long}


def test_prompts_that_end_at_once_do_not_keep_a_long_one_waiting() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=20, min_chunk_tokens=10)
    long = of("hog", 100, first=1)
    scheduler.add(long)
    compute(scheduler, scheduler.schedule())
    num_steps = 0
    while long.num_pending_tokens > 1:
        short = of("modest", 8, max_new_tokens=1, first=100 + num_steps)
        scheduler.add(short)
        compute(scheduler, scheduler.schedule())
        num_steps += 1
        assert num_steps < 40


def test_two_callers_with_prompts_of_one_size_get_every_other_step() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=10)
    sequences = [of(caller, 40, first=ord(caller)) for caller in "aaabbb"]
    for sequence in sequences:
        scheduler.add(sequence)
    served = {"a": 0, "b": 0}
    for _ in range(12):
        batch = scheduler.schedule()
        for sequence, num_tokens in batch.num_tokens.items():
            served[sequence.caller] += num_tokens
        compute(scheduler, batch)
        assert abs(served["a"] - served["b"]) <= 12


def test_the_urgent_of_a_caller_go_first_and_only_of_this_caller() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=10, max_num_seqs=1)
    first, late, urgent = of("a", 10), of("a", 10, first=7), of("a", 10, first=8, priority=-1)
    foreign = of("b", 10, first=9, priority=100)
    for sequence in (first, late, urgent, foreign):
        scheduler.add(sequence)
    began: list[Sequence] = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        began += [sequence for sequence in batch.num_tokens if sequence not in began]
        compute(scheduler, batch)
    assert began == [urgent, foreign, first, late]


def test_an_urgent_prompt_overtakes_one_that_is_begun() -> None:
    scheduler = make_scheduler(num_blocks=400, max_step_tokens=10)
    long, urgent = of("a", 40), of("a", 10, first=8, priority=-5)
    scheduler.add(long)
    compute(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    assert scheduler.schedule().num_tokens == {urgent: 10}


def test_the_least_urgent_is_preempted_though_others_are_younger() -> None:
    scheduler = make_scheduler(num_blocks=7)
    patient = of("a", 3, first=1, priority=9, max_new_tokens=8)
    urgent = of("a", 3, first=2, max_new_tokens=8)
    scheduler.add(patient)
    compute(scheduler, scheduler.schedule())
    scheduler.add(urgent)
    while not scheduler.num_preemptions:
        compute(scheduler, scheduler.schedule())
    assert patient.status is SequenceStatus.WAITING
    assert urgent.num_preemptions == 0


def test_a_cache_full_of_one_caller_makes_way_for_another() -> None:
    scheduler = make_scheduler(num_blocks=40)
    hog = [of("hog", 14, first=100 + index, max_new_tokens=2) for index in range(5)]
    for sequence in hog:
        scheduler.add(sequence)
    compute(scheduler, scheduler.schedule())
    assert scheduler.blocks.num_free_blocks < 8
    other = of("other", 14)
    scheduler.add(other)
    batch = scheduler.schedule()
    assert other in batch.num_tokens
    assert [sequence.num_preemptions for sequence in hog] == [0, 0, 0, 1, 1], "its youngest"
    while scheduler.has_work:
        compute(scheduler, scheduler.schedule())
    assert all(sequence.num_generated_tokens == 2 for sequence in hog)


def test_a_caller_within_its_share_keeps_it() -> None:
    scheduler = make_scheduler(num_blocks=16)
    mine = of("mine", 14, max_new_tokens=2)
    greedy = of("greedy", 26, first=5, max_new_tokens=2)
    scheduler.add(mine)
    compute(scheduler, scheduler.schedule())
    scheduler.add(greedy)
    assert list(scheduler.schedule().num_tokens) == [mine]
    assert scheduler.num_preemptions == 0


def test_full_places_make_way_as_well() -> None:
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=4)
    for index in range(6):
        scheduler.add(of("hog", 3, first=index + 10, max_new_tokens=50))
    compute(scheduler, scheduler.schedule())
    others = [of("other", 3, first=index + 50) for index in range(3)]
    for sequence in others:
        scheduler.add(sequence)
    for _ in range(3):
        compute(scheduler, scheduler.schedule())
    running = [sequence.caller for sequence in scheduler.running]
    assert sorted(running) == ["hog", "hog", "other", "other"]


class FairnessMachine(RuleBasedStateMachine):
    """Sequences of several callers come, run and are aborted, under budgets drawn at the start."""

    @initialize(
        num_blocks=st.integers(2, 14),
        max_step_tokens=st.integers(1, 9),
        max_seqs=st.integers(1, 5),
        max_chunk_tokens=st.none() | st.integers(1, 5),
        max_draft_tokens=st.sampled_from([0, 3]),
    )
    def start(
        self,
        num_blocks: int,
        max_step_tokens: int,
        max_seqs: int,
        max_chunk_tokens: int | None,
        max_draft_tokens: int,
    ) -> None:
        self.scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK_SIZE),
            max_step_tokens=max_step_tokens,
            max_num_seqs=max_seqs,
            max_chunk_tokens=max_chunk_tokens,
            max_draft_tokens=max_draft_tokens,
        )
        self.living: list[Sequence] = []

    @rule(
        caller=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        num_prompt=st.integers(1, 14),
        max_new_tokens=st.integers(1, 10),
        first=st.integers(0, 3),
    )
    def add(
        self, caller: str, priority: int, num_prompt: int, max_new_tokens: int, first: int
    ) -> None:
        sequence = of(
            caller, num_prompt, priority=priority, max_new_tokens=max_new_tokens, first=first
        )
        if sequence.max_tokens - 1 <= self.scheduler.blocks.num_blocks * BLOCK_SIZE:
            self.scheduler.add(sequence)
            self.living.append(sequence)

    @rule()
    def step(self) -> None:
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        for sequence, num_tokens in batch.num_tokens.items():
            batch.num_tokens[sequence] = num_tokens - len(sequence.draft_ids)
            sequence.draft_ids = []  # as if none was right
        check_batch(self.scheduler, batch)
        assert bool(batch.num_tokens) == had_work
        for sequence in compute(self.scheduler, batch):
            self.living.remove(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        self.scheduler.finish(sequence)
        self.living.remove(sequence)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            found = [*self.scheduler.running, *self.scheduler.waiting]
            assert sorted(map(id, found)) == sorted(map(id, self.living))
            assert len(self.scheduler.waiting) == len(found) - len(self.scheduler.running)
            self.scheduler.blocks.check_integrity(found)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        sequences = list(self.living)
        # Every step gives somebody a token or a part of a prompt; a preempted prompt begins anew,
        # and only when somebody else got a token.
        longest = max((steps_alone(self.scheduler, item) for item in sequences), default=0)
        new_tokens = sum(item.request.max_new_tokens for item in sequences)
        for _ in range((new_tokens + 1) * (longest + 1)):
            self.step()
        assert not self.scheduler.has_work, "a sequence starves"
        assert all(item.num_tokens == item.max_tokens for item in sequences)
        assert self.scheduler.blocks.num_free_blocks == self.scheduler.blocks.num_blocks


TestFairnessMachine = FairnessMachine.TestCase
TestFairnessMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
