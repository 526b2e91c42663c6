"""Which of several engines computes a request: one that knows its beginning, unless it is too busy.

An engine keeps the blocks of prompts in its cache, so the next prompt with the same beginning costs
less there than anywhere else. What each engine was given is remembered here, not asked for: engines
know nothing of each other, and their caches forget the least recently used blocks as this does.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

_MAX_BLOCKS = 256  # of a prompt that are looked at
_MAX_REMEMBERED = 65_536  # blocks, at about 150 bytes each
# The least share of a prompt that has to be known: most conversations begin with the same few
# tokens, and all of them would go to one engine.
_MIN_SHARE = 0.25
# An engine with this many more requests than the least busy one, or this many times as many, is too
# busy. In a smaller batch the blocks that are known save more than the others of the batch cost.
_MAX_MORE = 8
_MAX_RATIO = 1.5


class EngineChoice:
    """Chooses engines, which are numbers.

    Args:
        block_size: tokens per block of the engines' caches.
        prefix_affinity: whether beginnings matter, or only who is least busy.
        max_remembered: blocks that are remembered.
    """

    def __init__(
        self,
        block_size: int,
        *,
        prefix_affinity: bool = True,
        max_remembered: int = _MAX_REMEMBERED,
    ) -> None:
        self._block_size = block_size
        self._prefix_affinity = prefix_affinity
        self._max_remembered = max_remembered
        # By the hash of all tokens up to a block's end: the engines that had it, as bits.
        self._holders: OrderedDict[int, int] = OrderedDict()
        self._ticks = itertools.count()
        self._last: dict[int, int] = {}  # when each was chosen last

    @property
    def num_remembered(self) -> int:
        """Blocks that are remembered."""
        return len(self._holders)

    def choose(
        self,
        token_ids: Sequence[int],
        adapter: str,
        loads: Mapping[int, int],
        images: Sequence[tuple[int, bytes]] = (),
    ) -> int:
        """Returns an engine for a prompt, and remembers that it has the prompt now.

        Args:
            token_ids: of the prompt.
            adapter: with which it is computed: caches keep adapters apart.
            loads: the engines to choose from, with the requests that each of them has.
            images: where those of the prompt begin, and what they are: their tokens are all alike.

        Raises:
            ValueError: there is no engine to choose from.
        """
        chain = list(self._chain(token_ids, adapter, images)) if self._prefix_affinity else []
        engine = self._by_prefix(chain, loads)
        if engine is None:
            engine = self._least_busy(loads)
        self._last[engine] = next(self._ticks)
        self._remember(chain, engine)
        return engine

    def forget(self, engine: int) -> None:
        """An engine has lost its cache."""
        kept = ((block, holders & ~(1 << engine)) for block, holders in self._holders.items())
        self._holders = OrderedDict((block, holders) for block, holders in kept if holders)

    def _chain(
        self, token_ids: Sequence[int], adapter: str, images: Sequence[tuple[int, bytes]]
    ) -> Iterator[int]:
        """The hashes of a prompt up to the end of each of its full blocks.

        They need not withstand an attack: two prompts with one hash share an engine, no more.
        """
        size = self._block_size
        chained = hash(adapter)
        for index in range(min(len(token_ids) // size, _MAX_BLOCKS)):
            begun = tuple(digest for start, digest in images if start // size == index)
            chained = hash((chained, tuple(token_ids[index * size : (index + 1) * size]), begun))
            yield chained

    def _by_prefix(self, chain: Sequence[int], loads: Mapping[int, int]) -> int | None:
        """The engine that knows most of a prompt and is not too busy, if there is one."""
        known = list(itertools.takewhile(bool, (self._holders.get(block, 0) for block in chain)))
        min_blocks = max(1, math.ceil(len(chain) * _MIN_SHARE))
        least = min(loads.values(), default=0)
        most = max(least + _MAX_MORE, least * _MAX_RATIO)
        for holders in reversed(known[min_blocks - 1 :]):
            able = {engine: load for engine, load in loads.items() if holders >> engine & 1}
            if able and min(able.values()) <= most:
                return self._least_busy(able)
        return None

    def _least_busy(self, loads: Mapping[int, int]) -> int:
        """Of equally busy ones the one whose turn it is."""
        return min(loads, key=lambda engine: (loads[engine], self._last.get(engine, -1)))

    def _remember(self, chain: Sequence[int], engine: int) -> None:
        """The beginning last: it is the last to be forgotten."""
        for block in reversed(chain):
            self._holders[block] = self._holders.get(block, 0) | 1 << engine
            self._holders.move_to_end(block)
        while len(self._holders) > self._max_remembered:
            self._holders.popitem(last=False)
