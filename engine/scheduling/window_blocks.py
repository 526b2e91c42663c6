"""Which sequences hold which blocks, where some layers see only a window of a text.

A sequence has two tables: the blocks of layers that see everything, and those of layers with a
window, which are freed while it runs, as soon as no later token sees them::

    block_table    [ 7             | 9             ]    32 tokens per block
    window_table   [ - | - | - | - | - | 3 | 4 | 8 ]     8 tokens per block
                                         ^ num_left_blocks: those before it are gone

Freed blocks keep their content, as all do, until they are allocated again. Of a prefix, all blocks
of the first kind have to be there, and those of the second that the next token's window needs.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

from ..block_form import BlockForm
from .block_manager import BlockManager
from .sequence import Sequence

NO_BLOCK = 0  # in the place of blocks that are gone: kernels may read it, and nobody writes it
_WINDOWED = b"w"  # begins the names of blocks of layers with a window


class WindowBlockManager(BlockManager):
    """Allocates the blocks 1 … num_blocks - 1 for both kinds of layers.

    Args:
        num_blocks: blocks in the cache.
        form: what a block holds.
        max_step_tokens: the most tokens of a sequence that a step computes.
        enable_prefix_caching: whether full blocks are shared.
    """

    reserve = 2  # a token may need a block of either kind

    def __init__(
        self,
        num_blocks: int,
        form: BlockForm,
        max_step_tokens: int,
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        super().__init__(num_blocks, form.block_size, enable_prefix_caching=enable_prefix_caching)
        del self._free[NO_BLOCK]
        self.num_blocks -= 1
        self.form = self._form = form
        self._lookahead = max_step_tokens

    def num_blocks_for(self, num_tokens: int) -> int:
        """The most blocks that this many tokens take at the same time."""
        return self._form.num_blocks(num_tokens, self._lookahead)

    def num_held(self, sequence: Sequence) -> int:
        """See `BlockManager.num_held`."""
        windowed = len(sequence.window_table) - sequence.num_left_blocks
        return len(sequence.block_table) + windowed

    def num_lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """See `BlockManager.num_lacking`."""
        return sum(self._lacking(sequence, num_tokens))

    def match_prefix(self, sequence: Sequence) -> int:
        """See `BlockManager.match_prefix`."""
        assert not sequence.block_table
        assert not sequence.window_table
        if not self.enable_prefix_caching or sequence.request.prompt_logprobs:
            return 0
        length = self._longest_prefix(sequence)
        first = self._form.first_needed(length * self.block_size)
        ratio = self._form.ratio
        for index in range(ratio - 1, length, ratio) if ratio else ():
            sequence.block_table.append(self._take(self._block_hash(sequence, index)))
        sequence.window_table.extend([NO_BLOCK] * first)
        for index in range(first, length):
            name = _WINDOWED + self._block_hash(sequence, index)
            sequence.window_table.append(self._take(name))
        sequence.num_left_blocks = first
        sequence.num_committed_blocks = length
        return length * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a sequence the blocks for its first `num_tokens` tokens, or none.

        In layers with a window, for those of the next step only. What no later token sees is freed
        first.

        Returns:
            Whether there were enough free blocks.
        """
        self._slide(sequence)
        whole, windowed = self._lacking(sequence, num_tokens)
        if whole + windowed > len(self._free):
            return False
        sequence.block_table.extend([self._new() for _ in range(whole)])
        sequence.window_table.extend([self._new() for _ in range(windowed)])
        return True

    def free(self, sequence: Sequence) -> None:
        """Frees a sequence's blocks; the last ones are the first to be reused."""
        super().free(sequence)
        for block in reversed(sequence.window_table[sequence.num_left_blocks :]):
            self._release(block)
        del sequence.window_table[:]
        sequence.num_left_blocks = 0

    def forget(self, sequence: Sequence) -> None:
        """Removes the names of a sequence's blocks, those that it has left behind included."""
        super().forget(sequence)
        for name in sequence.block_hashes:
            block = self._block_of.get(_WINDOWED + name)
            if block is not None:
                self._forget(block)

    def check_integrity(self, sequences: Ids[Sequence]) -> None:
        """Asserts that the counts agree with the tables of all unfinished sequences."""
        for sequence in sequences:
            assert not any(sequence.window_table[: sequence.num_left_blocks])
        tables = [s.window_table[s.num_left_blocks :] for s in sequences]
        self._check_counts([*tables, *(s.block_table for s in sequences)], {NO_BLOCK})

    def _name_blocks(self, sequence: Sequence, begin: int, end: int) -> None:
        ratio = self._form.ratio
        for index in range(begin, end):
            name = self._block_hash(sequence, index)
            if index >= sequence.num_left_blocks:
                self._name(sequence.window_table[index], _WINDOWED + name)
            if ratio and (index + 1) % ratio == 0:
                self._name(sequence.block_table[index // ratio], name)

    def _longest_prefix(self, sequence: Sequence) -> int:
        """The length of the longest prefix that can be used, in blocks with a window."""
        ratio, longest, run = self._form.ratio or 1, 0, 0
        for length in range(1, (sequence.num_tokens - 1) // self.block_size + 1):
            name = self._block_hash(sequence, length - 1)
            run = run + 1 if _WINDOWED + name in self._block_of else 0
            if length % ratio:
                continue
            if self._form.ratio and name not in self._block_of:
                break
            if run >= length - self._form.first_needed(length * self.block_size):
                longest = length
        return longest

    def _lacking(self, sequence: Sequence, num_tokens: int) -> tuple[int, int]:
        """Blocks of either kind that a sequence lacks for its first tokens."""
        whole = self._form.num_whole(num_tokens) - len(sequence.block_table)
        end = min(num_tokens, sequence.num_computed_tokens + self._lookahead)
        windowed = -(-end // self.block_size) - len(sequence.window_table)
        return max(0, whole), max(0, windowed)

    def _slide(self, sequence: Sequence) -> None:
        """Frees the blocks that no token sees which is not computed yet."""
        first, table = self._form.first_needed(sequence.num_computed_tokens), sequence.window_table
        for index in range(sequence.num_left_blocks, first):
            self._release(table[index])
            table[index] = NO_BLOCK
        sequence.num_left_blocks = max(first, sequence.num_left_blocks)

    def _take(self, name: bytes) -> int:
        """Acquires a block by its name."""
        block = self._block_of[name]
        self._acquire(block)
        return block
