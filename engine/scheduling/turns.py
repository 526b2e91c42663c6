"""Callers take turns: the one for which the fewest tokens were computed is next.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
algorithm 2, with the same price for every token. A caller that comes back is lifted to the least of
those that are there, so that being away saves nothing up.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

_MAX_REMEMBERED = 4096  # callers: their names come from outside
_LATELY = 128  # steps: a caller that asks again within them is taken for one that is still here


class Turns:
    """Counts the tokens that are computed for each caller."""

    def __init__(self) -> None:
        self._served: OrderedDict[str, int] = OrderedDict()  # the last one served at the end
        self._present: Counter[str] = Counter()  # unfinished sequences
        self._last_left = 0  # the count of the caller whose last sequence finished last
        self._num_steps = 0
        self._left: OrderedDict[str, int] = OrderedDict()  # when callers left, the last at the end

    def step(self) -> None:
        """A step begins."""
        self._num_steps += 1

    @property
    def are_shared(self) -> bool:
        """Whether there is more than one caller now, or was lately."""
        callers = set(self._present)
        for caller in reversed(self._left):
            if len(callers) > 1 or self._num_steps - self._left[caller] > _LATELY:
                break
            callers.add(caller)
        return len(callers) > 1

    def enter(self, caller: str) -> None:
        """A caller has one more sequence."""
        if caller not in self._present:
            floor = min(map(self.served, self._present), default=self._last_left)
            self.charge(caller, max(floor - self.served(caller), 0))
        self._present[caller] += 1

    def leave(self, caller: str) -> None:
        """A caller has one sequence less."""
        self._present[caller] -= 1
        if not self._present[caller]:
            del self._present[caller]
            self._last_left = self.served(caller)
            self._left[caller] = self._num_steps
            self._left.move_to_end(caller)
            if len(self._left) > _MAX_REMEMBERED:
                self._left.popitem(last=False)

    def charge(self, caller: str, num_tokens: int) -> None:
        """Counts tokens that are computed for a caller; below zero, that were not after all."""
        self._served[caller] = self.served(caller) + num_tokens
        self._served.move_to_end(caller)
        if len(self._served) > _MAX_REMEMBERED:
            self._served.popitem(last=False)

    def served(self, caller: str) -> int:
        """The tokens that count as computed for a caller."""
        return self._served.get(caller, 0)
