"""How often each token occurs in a text that grows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Self


class TokenCounts:
    """Token ids and their counts, in arrays that a step reads without a look at each number.

    `ids` int64 [n]: the tokens that occur, each once. `counts` float32 [n]: how often. Neither can
    grow while somebody holds its memory.

    Args:
        token_ids: the text so far.
    """

    __slots__ = ("_places", "counts", "ids")

    def __init__(self, token_ids: Iterable[int]) -> None:
        counter = Counter(token_ids)
        self.ids = array("q", counter)
        self.counts = array("f", counter.values())
        self._places = {token_id: place for place, token_id in enumerate(counter)}

    def add(self, token_id: int) -> None:
        """Counts one more."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(1.0)
        else:
            self.counts[place] += 1.0

    def extended(self, token_ids: Iterable[int]) -> Self:
        """The counts of a longer text."""
        longer = type(self)(())
        longer.ids, longer.counts = self.ids[:], self.counts[:]
        longer._places = self._places.copy()
        for token_id in token_ids:
            longer.add(token_id)
        return longer
