"""How fast requests end, so that a caller who is refused knows when to come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 30.0
_MAX_WAIT_S = 60


class Turnover:
    """Counts requests that end, over the last `_WINDOW_S`.

    Args:
        clock: monotonic seconds.
        num_alike: processes that share the load, of which this is one: as many end in each.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, num_alike: int = 1) -> None:
        self._clock = clock
        self._num_alike = num_alike
        self._began = clock()
        self._ends: deque[float] = deque()

    def note_end(self) -> None:
        """A request has ended."""
        self._ends.append(self._clock())
        self._forget()

    def seconds_for(self, count: int) -> int:
        """In how many seconds so many requests will have ended, at this rate: 1 to `_MAX_WAIT_S`.

        Where none has ended, as long as none has: the first may end at any time.
        """
        self._forget()
        watched_s = min(self._clock() - self._began, _WINDOW_S)
        num_ends = len(self._ends) * self._num_alike
        wait_s = watched_s * count / num_ends if num_ends else watched_s
        return min(max(math.ceil(wait_s), 1), _MAX_WAIT_S)

    def _forget(self) -> None:
        oldest = self._clock() - _WINDOW_S
        while self._ends and self._ends[0] < oldest:
            self._ends.popleft()
