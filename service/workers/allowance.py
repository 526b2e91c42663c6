"""How many bytes may go where nobody counts them any more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Allowance:
    """A number of bytes in any so many seconds.

    It is used from one event loop only, so it needs no lock.

    Args:
        max_bytes: in that time, of all requests.
        seconds: after which bytes count no more.
        clock: in seconds.
    """

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._taken: deque[tuple[float, int]] = deque()  # when, and how many; the earliest first
        self._num_taken = 0

    def take(self, num_bytes: int) -> bool:
        """Takes bytes, if there are so many left."""
        now = self._clock()
        while self._taken and self._taken[0][0] <= now - self._seconds:
            self._num_taken -= self._taken.popleft()[1]
        if self._num_taken + num_bytes > self._max:
            return False
        self._taken.append((now, num_bytes))
        self._num_taken += num_bytes
        return True
