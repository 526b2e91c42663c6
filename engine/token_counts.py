"""How often each token occurs in a text that grows."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Token ids and their counts, in arrays that a step reads without a look at each number.

    Args:
        token_ids: the text so far.
    """

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, token_ids: Iterable[int]) -> None:
        counter = Counter(token_ids)
        self._ids = array("q", counter)
        self._counts = array("f", counter.values())
        self._places = {token_id: place for place, token_id in enumerate(counter)}

    @property
    def ids(self) -> NDArray[np.int64]:
        """Int64 [n]: the tokens that occur, each once. Nothing may be added while it is in use."""
        return np.frombuffer(self._ids, dtype=np.int64)

    @property
    def counts(self) -> NDArray[np.float32]:
        """Float32 [n], likewise: how often."""
        return np.frombuffer(self._counts, dtype=np.float32)

    def add(self, token_id: int) -> None:
        """Counts one more."""
        place = self._places.setdefault(token_id, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token_id)
            self._counts.append(1.0)
        else:
            self._counts[place] += 1.0

    def extended(self, token_ids: Iterable[int]) -> Self:
        """The counts of a longer text."""
        longer = type(self)(())
        longer._ids, longer._counts = self._ids[:], self._counts[:]
        longer._places = self._places.copy()
        for token_id in token_ids:
            longer.add(token_id)
        return longer
