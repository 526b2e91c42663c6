"""Block allocation: no block is lost or allocated twice, and shared blocks hold the same tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.protocol.request import Request
from engine.scheduling.block_manager import BlockManager, hash_block
from engine.scheduling.sequence import Sequence

NUM_BLOCKS = 10
BLOCK_SIZE = 2


def make_sequence(token_ids: list[int], *, prompt_logprobs: bool = False) -> Sequence:
    """A sequence with this prompt."""
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=tuple(token_ids),
            max_new_tokens=100,
            prompt_logprobs=prompt_logprobs,
        )
    )


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    """Allocates, computes and commits all tokens of a sequence."""
    assert blocks.allocate(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)


class BlockManagerMachine(RuleBasedStateMachine):
    """Random sequences, compared with a model of the blocks' contents and the order of frees."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.living: list[Sequence] = []
        self.content: dict[int, list[int]] = {}  # the content of the cache's tensors
        self.free_order = list(range(NUM_BLOCKS))  # the longest free first

    @rule(
        # Two token ids only, so that prompts have common prefixes.
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        prompt_logprobs=st.integers(0, 4).map(lambda n: n == 0),
    )
    def start(self, token_ids: list[int], prompt_logprobs: bool) -> None:
        sequence = make_sequence(token_ids, prompt_logprobs=prompt_logprobs)
        num_cached = self.blocks.match_prefix(sequence)
        assert num_cached == len(sequence.block_table) * BLOCK_SIZE
        assert num_cached < len(token_ids), "one token is left to compute"
        assert not (prompt_logprobs and num_cached)
        for index, block in enumerate(sequence.block_table):
            first = index * BLOCK_SIZE
            assert self.content[block] == token_ids[first : first + BLOCK_SIZE]
            if block in self.free_order:
                self.free_order.remove(block)
        sequence.num_computed_tokens = num_cached
        if self.extend_to(sequence, len(token_ids)):
            self.living.append(sequence)
        else:
            self.release(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def decode(self, data: st.DataObject, token_id: int) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        sequence.append(token_id)
        if not self.extend_to(sequence, sequence.num_tokens):
            self.living.remove(sequence)
            self.release(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        self.living.remove(sequence)
        self.release(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def refuse_what_does_not_fit(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        table = sequence.block_table[:]
        assert not self.blocks.allocate(sequence, NUM_BLOCKS * BLOCK_SIZE + 1)
        assert sequence.block_table == table

    def extend_to(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates and computes up to `num_tokens`, writing them into the model of the cache."""
        num_new = -(-num_tokens // BLOCK_SIZE) - len(sequence.block_table)
        num_old = len(sequence.block_table)
        fits = num_new <= len(self.free_order)
        assert self.blocks.allocate(sequence, num_tokens) == fits
        if not fits:
            return False
        new = [*sequence.block_table[num_old:]]
        assert new == self.free_order[: len(new)], "the longest free blocks are reused first"
        del self.free_order[: len(new)]
        self.content.update((block, []) for block in new)
        for position in range(sequence.num_computed_tokens, num_tokens):
            block = sequence.block_table[position // BLOCK_SIZE]
            assert not any(block in other.block_table for other in self.living if other != sequence)
            self.content[block].append(sequence.token_ids[position])
        sequence.num_computed_tokens = num_tokens
        self.blocks.commit(sequence)
        return True

    def release(self, sequence: Sequence) -> None:
        """Frees a sequence; its last block becomes the first to be reused."""
        table = sequence.block_table[:]
        self.blocks.free(sequence)
        assert not sequence.block_table
        used = {block for other in self.living for block in other.block_table}
        self.free_order += [block for block in reversed(table) if block not in used]

    @invariant()
    def block_tables_agree(self) -> None:
        self.blocks.check_integrity(self.living)
        used = {block for sequence in self.living for block in sequence.block_table}
        assert self.blocks.num_free_blocks + len(used) == NUM_BLOCKS
        assert self.blocks.num_free_blocks == len(self.free_order)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_sequences_of_models_without_a_state_have_no_slot() -> None:
    sequence = make_sequence([1, 2, 3])
    compute(BlockManager(NUM_BLOCKS, BLOCK_SIZE), sequence)
    assert sequence.state_slot is None


def test_second_sequence_shares_the_full_blocks_of_the_first() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    first, second = make_sequence([1, 2, 3, 4, 5]), make_sequence([1, 2, 3, 4, 9])
    compute(blocks, first)

    assert blocks.match_prefix(second) == 4
    assert second.block_table == first.block_table[:2]


def test_freed_blocks_keep_their_content_until_they_are_allocated() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    first = make_sequence([1, 2, 3, 4, 5, 6])
    compute(blocks, first)
    blocks.free(first)
    other = make_sequence([9, 9, 9])
    compute(blocks, other)  # gets the unused block and the last block of the first sequence

    again = make_sequence([1, 2, 3, 4, 5, 6])
    assert blocks.match_prefix(again) == 4


def test_identical_prompt_still_computes_its_last_token() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    compute(blocks, make_sequence([1, 2, 3, 4]))

    assert blocks.match_prefix(make_sequence([1, 2, 3, 4])) == 2


def test_blocks_match_only_after_the_same_prefix() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    compute(blocks, make_sequence([1, 2, 3, 4, 5]))

    assert blocks.match_prefix(make_sequence([9, 9, 3, 4, 5])) == 0


def test_a_block_is_not_found_before_it_is_computed() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    assert blocks.allocate(make_sequence([1, 2, 3, 4, 5]), 5)

    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5])) == 0


def test_nothing_is_shared_when_prompt_logprobs_are_wanted() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    compute(blocks, make_sequence([1, 2, 3, 4, 5]))

    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5], prompt_logprobs=True)) == 0


def test_nothing_is_shared_when_caching_is_off() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False)
    compute(blocks, make_sequence([1, 2, 3, 4, 5]))

    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5])) == 0


def test_equal_sequences_computed_in_one_step_keep_their_own_blocks() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    equal = [make_sequence([1, 2, 3]) for _ in range(2)]
    for sequence in equal:
        compute(blocks, sequence)

    assert not set(equal[0].block_table) & set(equal[1].block_table)
    blocks.check_integrity(equal)
    blocks.free(equal[0])
    blocks.check_integrity(equal[1:])
    assert blocks.match_prefix(make_sequence([1, 2, 9])) == 2


def test_check_integrity_notices_a_lost_block() -> None:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    sequence = make_sequence([1, 2, 3])
    compute(blocks, sequence)

    with pytest.raises(AssertionError):
        blocks.check_integrity([])


def test_block_names_depend_on_parent_and_tokens() -> None:
    names = {
        hash_block(b"", [1, 2]),
        hash_block(b"", [2, 1]),
        hash_block(b"parent", [1, 2]),
    }
    assert len(names) == 3
