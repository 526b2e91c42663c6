"""Blocks behind a window are freed once, and no prefix is found without what its window sees."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_form import BlockForm
from engine.protocol.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.window_blocks import NO_BLOCK, WindowBlockManager

BLOCK_SIZE = 2
FORM = BlockForm(window=5, block_size=BLOCK_SIZE, ratio=3)  # blocks of 6 tokens, and of 2
ONLY_WINDOWS = BlockForm(window=5, block_size=BLOCK_SIZE, ratio=0)
STEP = 4  # tokens of a step


def make_sequence(
    token_ids: list[int], *, max_new_tokens: int = 100, adapter: str = ""
) -> Sequence:
    """A sequence with this prompt."""
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(token_ids),
        max_new_tokens=max_new_tokens,
        adapter=adapter,
    )
    return Sequence(request)


def make_blocks(
    form: BlockForm = FORM, *, num_blocks: int = 60, **options: bool
) -> WindowBlockManager:
    return WindowBlockManager(num_blocks, form, STEP, **options)


def compute(blocks: WindowBlockManager, sequence: Sequence) -> None:
    """Computes all tokens of a sequence, in steps."""
    while sequence.num_pending_tokens:
        assert blocks.allocate(sequence, sequence.num_tokens)
        sequence.num_computed_tokens = min(sequence.num_tokens, sequence.num_computed_tokens + STEP)
        blocks.commit(sequence)


class Cache:
    """The contents of a cache: of each block, the prefixes that end with its tokens.

    What attention sees of a token depends on all tokens before it, so that is what a slot holds.
    """

    def __init__(self, form: BlockForm) -> None:
        self.form = form
        self.slots: dict[tuple[bool, int, int], tuple[int, ...]] = {}

    def step(self, sequence: Sequence, num_tokens: int) -> None:
        """Writes a step's tokens, and reads what they see."""
        first, form = sequence.num_computed_tokens, self.form
        kinds = [(True, sequence.window_table, form.block_size, form.window)]
        if form.ratio:
            kinds.append((False, sequence.block_table, form.whole_size, sequence.num_tokens))
        for windowed, table, size, reach in kinds:
            for at in range(first, first + num_tokens):
                prefix = tuple(sequence.token_ids[: at + 1])
                self.slots[windowed, table[at // size], at % size] = prefix
            for at in range(first, first + num_tokens):
                for seen in range(max(0, at - reach + 1), at + 1):
                    found = self.slots[windowed, table[seen // size], seen % size]
                    assert found == tuple(sequence.token_ids[: seen + 1])


class WindowBlocksMachine(RuleBasedStateMachine):
    """Requests under a scheduler, whose steps read all that attention would read."""

    @initialize(
        num_blocks=st.integers(6, 24),
        max_step_tokens=st.integers(1, 9),
        window=st.integers(1, 8),
        ratio=st.integers(0, 3),
        max_draft_tokens=st.integers(0, 3),
    )
    def start(
        self,
        num_blocks: int,
        max_step_tokens: int,
        window: int,
        ratio: int,
        max_draft_tokens: int,
    ) -> None:
        self.form = BlockForm(window=window, block_size=BLOCK_SIZE, ratio=ratio)
        self.blocks = WindowBlockManager(num_blocks, self.form, max_step_tokens)
        self.scheduler = Scheduler(
            self.blocks,
            max_step_tokens=max_step_tokens,
            max_num_seqs=5,
            max_draft_tokens=max_draft_tokens,
        )
        self.cache = Cache(self.form)
        self.living: list[Sequence] = []

    @rule(
        # Two token ids only, so that prompts have common prefixes.
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_new_tokens=st.integers(1, 12),
        adapter=st.sampled_from(["", "", "ab"]),
    )
    def add(self, prompt: list[int], max_new_tokens: int, adapter: str) -> None:
        sequence = make_sequence(prompt, max_new_tokens=max_new_tokens, adapter=adapter)
        self.scheduler.max_adapters = 1
        if self.blocks.num_blocks_for(sequence.max_tokens - 1) <= self.blocks.num_blocks:
            self.scheduler.add(sequence)
            self.living.append(sequence)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        assert bool(batch.num_tokens) == had_work
        for sequence, num_tokens in batch.num_tokens.items():
            known = sequence.token_ids
            sequence.token_ids = known + sequence.draft_ids
            self.cache.step(sequence, num_tokens)
            sequence.token_ids = known
        self.scheduler.advance(batch)
        for sequence in batch.num_tokens:
            if sequence.num_pending_tokens:
                continue
            accepted = data.draw(st.integers(0, len(sequence.draft_ids)))
            tokens = [*sequence.draft_ids[:accepted], data.draw(st.integers(0, 1))]
            reasons = [sequence.append(token) for token in tokens]
            self.scheduler.accept(sequence, accepted)
            if reasons[-1] is not None:
                self.scheduler.finish(sequence)
                self.living.remove(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        self.scheduler.finish(sequence)
        self.living.remove(sequence)

    @invariant()
    def blocks_are_held_once_or_shared_by_the_same_prefix(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.blocks.check_integrity(self.living)
        used = set()
        for sequence in self.living:
            held = sequence.window_table[sequence.num_left_blocks :]
            assert NO_BLOCK not in held
            assert len(held) <= self.form.num_windowed(10**9, self.scheduler.max_step_tokens)
            assert self.blocks.num_held(sequence) <= self.blocks.num_blocks_for(10**9)
            used |= {*held, *sequence.block_table}
        assert self.blocks.num_free_blocks + len(used) == self.blocks.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for sequence in list(self.living):
            self.scheduler.finish(sequence)
        assert self.blocks.num_free_blocks == self.blocks.num_blocks


TestWindowBlocksMachine = WindowBlocksMachine.TestCase
TestWindowBlocksMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("form", [FORM, ONLY_WINDOWS], ids=["both kinds", "only windows"])
def test_a_long_text_holds_its_window_and_the_whole_layers_share(form: BlockForm) -> None:
    blocks = make_blocks(form)
    sequence = make_sequence(list(range(60)))
    most = 0
    while sequence.num_pending_tokens:
        assert blocks.allocate(sequence, 60)
        most = max(most, blocks.num_held(sequence) - len(sequence.block_table))
        sequence.num_computed_tokens += STEP
        blocks.commit(sequence)
    assert len(sequence.block_table) == (10 if form.ratio else 0)
    assert most == 4  # the four tokens before a step, and its own
    sequence.append(7)
    assert blocks.allocate(sequence, 61)
    assert len(sequence.window_table) - sequence.num_left_blocks == 3


@pytest.mark.parametrize("form", [FORM, ONLY_WINDOWS], ids=["both kinds", "only windows"])
def test_freed_blocks_of_a_window_are_found_again_until_they_are_reused(form: BlockForm) -> None:
    blocks = make_blocks(form)
    first = make_sequence(list(range(40)))
    compute(blocks, first)
    # The first's own window is far beyond these tokens.
    second = make_sequence([*range(12), 99, 98])
    assert blocks.match_prefix(second) == 12
    assert [*second.window_table[:4]] == [NO_BLOCK] * 4
    assert second.num_left_blocks == 4
    blocks.check_integrity([first, second])


def test_a_prefix_without_the_blocks_of_its_last_window_is_shorter() -> None:
    blocks = make_blocks(num_blocks=60)
    first = make_sequence(list(range(30)))
    compute(blocks, first)
    blocks.free(first)
    lost = blocks._block_of[b"w" + first.block_hashes[10]]  # of tokens 20 and 21
    blocks._forget(lost)
    # 24 tokens would need the window 20 … 23; 18 tokens need 14 … 17.
    assert blocks.match_prefix(make_sequence([*range(30)])) == 18


def test_a_prefix_is_no_longer_than_the_blocks_that_see_everything() -> None:
    blocks = make_blocks(num_blocks=60)
    first = make_sequence(list(range(30)))
    compute(blocks, first)
    blocks.free(first)
    blocks._forget(blocks._block_of[first.block_hashes[11]])  # of tokens 18 … 23
    again = make_sequence([*range(30)])
    assert blocks.match_prefix(again) == 18
    assert len(again.block_table) == 3


def test_another_adapter_shares_nothing() -> None:
    blocks = make_blocks()
    compute(blocks, make_sequence(list(range(30))))
    assert blocks.match_prefix(make_sequence([*range(30)], adapter="ab")) == 0
    assert blocks.match_prefix(make_sequence([*range(30)])) == 24


@pytest.mark.parametrize("form", [FORM, ONLY_WINDOWS], ids=["both kinds", "only windows"])
def test_nothing_that_a_failed_text_has_computed_is_shared(form: BlockForm) -> None:
    blocks = make_blocks(form)
    first = make_sequence(list(range(30)))
    compute(blocks, first)
    blocks.forget(first)
    blocks.free(first)
    for length in (8, 14, 20, 30):
        assert blocks.match_prefix(make_sequence([*range(length)])) == 0


def test_nothing_is_shared_when_caching_is_off() -> None:
    blocks = make_blocks(enable_prefix_caching=False)
    compute(blocks, make_sequence(list(range(30))))
    assert blocks.match_prefix(make_sequence([*range(30)])) == 0


def test_equal_texts_computed_at_the_same_time_keep_their_own_blocks() -> None:
    blocks = make_blocks()
    equal = [make_sequence(list(range(20))) for _ in range(2)]
    for sequence in equal:
        compute(blocks, sequence)
    one, other = ({*s.block_table, *s.window_table} - {NO_BLOCK} for s in equal)
    assert not one & other
    blocks.check_integrity(equal)


def test_check_integrity_notices_a_lost_block_of_a_window() -> None:
    blocks = make_blocks()
    sequence = make_sequence(list(range(20)))
    compute(blocks, sequence)
    sequence.window_table.pop()
    with pytest.raises(AssertionError):
        blocks.check_integrity([sequence])


def test_a_text_that_is_longer_than_half_of_all_blocks_makes_room_for_itself() -> None:
    """Its window moves on in the blocks that it leaves, also where there are no others."""
    form = BlockForm(window=5, block_size=BLOCK_SIZE, ratio=3)
    needed = form.num_blocks(60, STEP)
    scheduler = Scheduler(
        WindowBlockManager(needed + 1, form, STEP), max_step_tokens=STEP, max_num_seqs=4
    )
    sequence = make_sequence(list(range(40)), max_new_tokens=21)
    scheduler.add(sequence)
    lengths = [0]
    while sequence.finish_reason is None:
        batch = scheduler.schedule()
        scheduler.advance(batch)
        lengths.append(sequence.num_computed_tokens)
        if not sequence.num_pending_tokens and sequence.append(1) is not None:
            scheduler.finish(sequence)
    assert all(a < b for a, b in pairwise(lengths))
    assert scheduler.num_preemptions == 0
