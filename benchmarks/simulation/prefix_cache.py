"""Which blocks of prompts a replica still has."""

from __future__ import annotations

from collections import OrderedDict

BLOCK_TOKENS = 16  # `--block-size`


class PrefixCache:
    """Blocks of the beginnings of sessions, of which those not used for longest go first.

    Args:
        num_blocks: how many there is room for.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blocks: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, session: int, num_blocks: int) -> int:
        """How many of a session's first blocks are there without a gap."""
        found = 0
        while found < num_blocks and (session, found) in self._blocks:
            found += 1
        return found

    def keep(self, session: int, num_blocks: int) -> None:
        """Keeps a session's first blocks; the last ones go first, since they need the others."""
        for index in reversed(range(num_blocks)):
            self._blocks[session, index] = None
            self._blocks.move_to_end((session, index))
        while len(self._blocks) > self.num_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything, as a process does that starts anew."""
        self._blocks.clear()
