"""Which sequences hold which blocks and slots, where a model keeps a state beside the cache.

Blocks of a prefix are of use only together with the state at their end, which takes as much memory
as many blocks. So it is kept at a few positions only::

    prompt   |----------------|--------------|------------------|---|
                              every interval  where another text ^ the end of its last whole block
                                              went on otherwise    that a later text can share

and while a text is generated at the end of its latest whole block. A prefix ends where there are
both, the blocks and a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ids

from .block_manager import BlockManager
from .sequence import Sequence
from .state_slots import StateSlots

_MIN_INTERVAL = 256  # tokens; a division of a text costs a call of each layer
_COPIES_PER_TEXT = 0.25  # of all, which the longest text may take


def copy_interval(max_total_tokens: int, block_size: int, num_copies: int) -> int:
    """The tokens after which a prompt's state is kept: a multiple of `block_size`, 0 for never."""
    per_text = int(num_copies * _COPIES_PER_TEXT)
    if not per_text:
        return 0
    tokens = max(_MIN_INTERVAL, -(-max_total_tokens // per_text))
    return -(-tokens // block_size) * block_size


class StateBlockManager(BlockManager):
    """Allocates blocks, and a slot for the state of each sequence that has blocks.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        slots: of the states.
        interval: tokens of a prompt after which its state is kept at the latest: a multiple of
            `block_size`, or 0 for no such positions.
        enable_prefix_caching: whether full blocks are shared.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        slots: StateSlots,
        *,
        interval: int = 0,
        enable_prefix_caching: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.slots = slots
        self._interval = interval
        # The latest state kept of the answer of each sequence, of half as many sequences at most as
        # there are slots: many answers at a time would push out the states of all prompts.
        self._of_answers: dict[Sequence, bytes] = {}

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """See `BlockManager.allocate`; a sequence without a slot gets one.

        Returns:
            Whether there were enough free blocks, and a slot.
        """
        lacks_slot = sequence.state_slot is None
        if lacks_slot and self.slots.num_free < 1:
            return False
        if not super().allocate(sequence, num_tokens):
            return False
        if lacks_slot:
            sequence.state_slot = self.slots.take()
        return True

    def reserve_drafts(self, sequence: Sequence, num_drafts: int) -> int:
        """See `BlockManager.reserve_drafts`: each takes a slot for the state before it."""
        for _ in range(num_drafts):
            slot = self.slots.take_copy()
            if slot is None:
                break
            sequence.draft_slots.append(slot)
        return len(sequence.draft_slots)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """See `BlockManager.accept`: the state of a sequence is that before its first wrong one."""
        if num_drafts < len(sequence.draft_slots) and sequence.state_slot is not None:
            right = sequence.draft_slots[num_drafts]
            sequence.draft_slots[num_drafts] = sequence.state_slot
            sequence.state_slot = right
        self._release_drafts(sequence)

    def plan(self, num_tokens: Mapping[Sequence, int]) -> None:
        """Takes slots for the states that a step's sequences leave; nobody takes slots after it."""
        if not self.enable_prefix_caching:
            return
        for sequence, number in num_tokens.items():
            for position in self._positions(sequence, number):
                if self._is_wanted(sequence, position):
                    slot = self.slots.take_copy()
                    if slot is not None:
                        sequence.state_copies.append((position, slot))

    def commit(self, sequence: Sequence) -> None:
        """See `BlockManager.commit`; the same for states."""
        super().commit(sequence)
        sequence.state_source = None
        while sequence.state_copies:
            position, slot = sequence.state_copies[0]
            if position > sequence.num_known_tokens:
                break
            del sequence.state_copies[0]
            self._keep(sequence, position, slot)

    def free(self, sequence: Sequence) -> None:
        """Frees a sequence's slots and blocks; its last block is the first to be reused."""
        if sequence.state_slot is not None:
            self.slots.release(sequence.state_slot)
            sequence.state_slot = None
        for _, slot in sequence.state_copies:
            self.slots.release_copy(slot)
        sequence.state_copies.clear()
        self._release_drafts(sequence)
        sequence.state_source = None
        self._of_answers.pop(sequence, None)
        super().free(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Removes the names of a sequence's blocks and states."""
        super().forget(sequence)
        for name in sequence.block_hashes:
            self.slots.forget(name)

    def check_integrity(self, sequences: Ids[Sequence]) -> None:
        """Asserts that the counts agree with the tables and slots of all unfinished sequences."""
        super().check_integrity(sequences)
        self.slots.check_integrity(
            (s.state_slot for s in sequences if s.state_slot is not None),
            (
                slot
                for s in sequences
                for slot in (*s.draft_slots, *(copy for _, copy in s.state_copies))
            ),
        )

    def _release_drafts(self, sequence: Sequence) -> None:
        for slot in sequence.draft_slots:
            self.slots.release_copy(slot)
        sequence.draft_slots.clear()

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest prefix that is in the cache, and whose state is kept."""
        blocks = super()._cached_blocks(sequence)
        sequence.prefix_end = len(blocks) * self.block_size
        while blocks:
            sequence.state_source = self.slots.find(sequence.block_hashes[len(blocks) - 1])
            if sequence.state_source is not None:
                break
            blocks.pop()
        return blocks

    def _positions(self, sequence: Sequence, num_tokens: int) -> Iterator[int]:
        """Where the state of a sequence is to be kept, in a step with so many of its tokens."""
        first, size = sequence.num_computed_tokens, self.block_size
        end = first + num_tokens - len(sequence.draft_ids)
        if first >= sequence.num_prompt_tokens:
            wanted = {end // size * size}
        else:
            wanted = {sequence.prefix_end, (sequence.num_tokens - 1) // size * size}
        if self._interval:
            wanted.update(range(self._interval, end + 1, self._interval))
        yield from sorted(position for position in wanted if first < position <= end)

    def _is_wanted(self, sequence: Sequence, position: int) -> bool:
        """Whether the state after so many tokens is not there yet, and may have a slot."""
        if position > sequence.num_prompt_tokens and sequence not in self._of_answers:
            if len(self._of_answers) >= self.slots.num_copies // 2:
                return False
            self._of_answers[sequence] = b""
        if position > sequence.num_tokens - sequence.has_placeholder:
            return True  # of what is being computed, nobody knows
        name = self._block_hash(sequence, position // self.block_size - 1)
        return self.slots.find(name) is None

    def _keep(self, sequence: Sequence, position: int, slot: int) -> None:
        """Lets a state be found; of a sequence's answer, it replaces the one before it."""
        name = self._block_hash(sequence, position // self.block_size - 1)
        self.slots.keep(slot, name)
        if position > sequence.num_prompt_tokens and sequence in self._of_answers:
            self.slots.forget(self._of_answers[sequence])
            self._of_answers[sequence] = name
