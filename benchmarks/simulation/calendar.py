"""What happens when; time goes from one entry to the next.

A heap and a loop is all that this simulation needs of a library such as simpy, whose processes are
generators, and which takes several times as long for each event.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class Calendar:
    """Actions by the second at which they happen; those of the same second in the order given."""

    def __init__(self) -> None:
        self.now = 0.0
        self._entries: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()

    def at(self, second: float, action: Action) -> None:
        """Enters an action, which happens now at the soonest."""
        heapq.heappush(self._entries, (max(second, self.now), next(self._numbers), action))

    def run(self) -> None:
        """Lets everything happen, until nothing is left."""
        while self._entries:
            self.now, _, action = heapq.heappop(self._entries)
            action()
