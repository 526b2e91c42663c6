"""How often each token occurs in a text that grows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Self


class TokenCounts:
    """Token ids and their counts, in arrays that a step copies as bytes, without a Python loop.

    `ids` int64 [n]: the tokens that occur, each once. `counts` float32 [n]: how often. An array
    cannot grow while a view of its memory exists.

    Args:
        token_ids: the text so far.
    """

    __slots__ = ("_index_of", "counts", "ids")

    def __init__(self, token_ids: Iterable[int]) -> None:
        counter = Counter(token_ids)
        self.ids = array("q", counter)
        self.counts = array("f", counter.values())
        self._index_of = {token_id: index for index, token_id in enumerate(counter)}

    def add(self, token_id: int) -> None:
        """Counts one more token."""
        index = self._index_of.setdefault(token_id, len(self.ids))
        if index == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(1.0)
        else:
            self.counts[index] += 1.0

    def extended(self, token_ids: Iterable[int]) -> Self:
        """The counts of a longer text."""
        longer = type(self)(())
        longer.ids, longer.counts = self.ids[:], self.counts[:]
        longer._index_of = self._index_of.copy()
        for token_id in token_ids:
            longer.add(token_id)
        return longer
