"""Which sequences hold which blocks of the KV cache.

A block holds `block_size` tokens of one sequence. A full block is named by a hash over all tokens
up to its end, so a later sequence with the same prefix shares it instead of computing it again. The
hash begins with the sequence's adapter, with which keys and values differ, and has the digests of
the images whose placeholders are in the block.
Blocks that no sequence holds keep their content until they are allocated again, those that have
been free the longest first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Set
from collections.abc import Sequence as Ids

from ..block_form import BlockForm
from .sequence import Sequence


def hash_block(parent: bytes, token_ids: Ids[int], images: bytes = b"") -> bytes:
    """The name of a full block: sha-256 of its parent's name, its tokens and its images."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes() + images).digest()


class BlockManager:
    """Allocates the blocks 0 … num_blocks - 1.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        enable_prefix_caching: whether full blocks are shared.
    """

    reserve = 1  # blocks that stay free for the next tokens of each running sequence
    form: BlockForm | None = None  # of blocks, where layers with a window have their own

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now, those with cached content included."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that this many tokens take."""
        return -(-num_tokens // self.block_size)

    def num_held(self, sequence: Sequence) -> int:
        """The number of blocks that a sequence holds."""
        return len(sequence.block_table)

    def num_lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """The number of blocks that `allocate` would give a sequence; below 1 for none."""
        return self.num_blocks_for(num_tokens) - len(sequence.block_table)

    def match_prefix(self, sequence: Sequence) -> int:
        """Gives a sequence without blocks the cached blocks of its prefix.

        At least one token is always left to compute, since its logits are wanted.

        Returns:
            The number of cached tokens: a multiple of `block_size`.
        """
        assert not sequence.block_table
        if not self.enable_prefix_caching or sequence.request.prompt_logprobs:
            return 0
        for block in self._cached_blocks(sequence):
            self._acquire(block)
            sequence.block_table.append(block)
        sequence.num_committed_blocks = len(sequence.block_table)
        return len(sequence.block_table) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends a block table to the first `num_tokens` tokens of a sequence, or not at all.

        Returns:
            Whether there were enough free blocks.
        """
        num_new = self.num_lacking(sequence, num_tokens)
        if num_new > len(self._free):
            return False
        for _ in range(num_new):
            sequence.block_table.append(self._new())
        return True

    def reserve_drafts(self, sequence: Sequence, num_drafts: int) -> int:
        """How many of so many draft tokens a sequence can have in a step, beside their blocks."""
        return num_drafts

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """Hears how many draft tokens of a sequence are right, of those that a step verified."""

    def plan(self, num_tokens: Mapping[Sequence, int]) -> None:
        """Hears of a step before it is launched: of how many tokens of which sequences."""

    def commit(self, sequence: Sequence) -> None:
        """Names the blocks that a sequence's computed tokens fill, so that they can be shared."""
        if sequence.num_computed_tokens // self.block_size == sequence.num_committed_blocks:
            return  # as after nearly every token
        if not self.enable_prefix_caching:
            return
        num_full = sequence.num_known_tokens // self.block_size
        self._name_blocks(sequence, sequence.num_committed_blocks, num_full)
        sequence.num_committed_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Frees a sequence's blocks; its last block is the first to be reused."""
        for block in reversed(sequence.block_table):
            self._release(block)
        del sequence.block_table[:]
        sequence.num_committed_blocks = 0

    def forget(self, sequence: Sequence) -> None:
        """Removes the names of a sequence's blocks: no other sequence shares wrong content."""
        for block in sequence.block_table:
            self._forget(block)

    def check_integrity(self, sequences: Ids[Sequence]) -> None:
        """Asserts that the counts agree with the block tables of all unfinished sequences."""
        self._check_counts([sequence.block_table for sequence in sequences], frozenset())

    def _check_counts(self, tables: Ids[Ids[int]], never_free: Set[int]) -> None:
        counts = [0] * len(self._ref_counts)
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the block tables"
        unused = {block for block, count in enumerate(counts) if count == 0}
        assert set(self._free) == unused - never_free
        assert self._block_of == {name: block for block, name in self._hash_of.items()}

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest prefix that is in the cache."""
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._block_of.get(self._block_hash(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _name_blocks(self, sequence: Sequence, begin: int, end: int) -> None:
        """Names a sequence's full blocks from index `begin` to `end - 1`."""
        for index in range(begin, end):
            self._name(sequence.block_table[index], self._block_hash(sequence, index))

    def _block_hash(self, sequence: Sequence, index: int) -> bytes:
        """The name of a sequence's full block, cached: block i needs the name of block i - 1."""
        hashes = sequence.block_hashes
        while index >= len(hashes):
            start = len(hashes) * self.block_size
            tokens = sequence.token_ids[start : start + self.block_size]
            parent = hashes[-1] if hashes else bytes.fromhex(sequence.request.adapter)
            hashes.append(hash_block(parent, tokens, _images(sequence, start, self.block_size)))
        return hashes[index]

    def _name(self, block: int, name: bytes) -> None:
        if name not in self._block_of:  # else the same block was computed twice in one step
            self._hash_of[block] = name
            self._block_of[name] = block

    def _new(self) -> int:
        """The block that has been free the longest."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free[block] = None

    def _acquire(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
        self._ref_counts[block] += 1

    def _forget(self, block: int) -> None:
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]


def _images(sequence: Sequence, start: int, num_tokens: int) -> bytes:
    """The digests of the images with placeholders among these tokens, one after the other."""
    images = sequence.request.images
    within = (image for image in images if image.is_within(start, start + num_tokens))
    return b"".join(image.digest for image in within)
