"""Callers take turns: the one for which the fewest tokens were computed is next.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
algorithm 2, with the same price for every token. A caller that comes back is lifted to the least of
those that are there, less one token: being away saves nothing up, and it has the next turn.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import islice

_MAX_REMEMBERED = 4096  # callers: their names come from outside
_MAX_LATE = 64  # callers that are looked at which were here lately
_LATELY = 128  # steps: a caller that asks again within them is taken for one that is still here


class Turns:
    """Counts the tokens that are computed for each caller."""

    def __init__(self) -> None:
        self._served: OrderedDict[str, int] = OrderedDict()  # the last one served at the end
        self._present: Counter[str] = Counter()  # unfinished sequences
        self._last_left = 0  # the count of the caller whose last sequence finished last
        self._num_steps = 0
        self._asked: OrderedDict[str, int] = OrderedDict()  # tokens of the last prompt
        self._left: OrderedDict[str, int] = OrderedDict()  # when callers left, the last at the end

    def step(self) -> None:
        """A step begins."""
        self._num_steps += 1

    @property
    def least_asked(self) -> int | None:
        """The shortest of the callers' last prompts; None with one caller, also for a while before.

        A caller that waits for steps of others no longer than its own waits twice as long at most.
        """
        callers = set(self._present)
        for caller in islice(reversed(self._left), _MAX_LATE):
            if self._num_steps - self._left[caller] > _LATELY:
                break
            callers.add(caller)
        return min(self._asked.get(caller, 0) for caller in callers) if len(callers) > 1 else None

    def enter(self, caller: str, num_tokens: int) -> None:
        """A caller has one more sequence, with a prompt of so many tokens."""
        _note(self._asked, caller, num_tokens)
        if caller not in self._present:
            floor = min(map(self.served, self._present), default=self._last_left) - 1
            self.charge(caller, max(floor - self.served(caller), 0))
        self._present[caller] += 1

    def leave(self, caller: str) -> None:
        """A caller has one sequence less."""
        self._present[caller] -= 1
        if not self._present[caller]:
            del self._present[caller]
            self._last_left = self.served(caller)
            _note(self._left, caller, self._num_steps)

    def charge(self, caller: str, num_tokens: int) -> None:
        """Counts tokens that are computed for a caller; below zero, that were not after all."""
        _note(self._served, caller, self.served(caller) + num_tokens)

    def served(self, caller: str) -> int:
        """The tokens that count as computed for a caller."""
        return self._served.get(caller, 0)


def _note(notes: OrderedDict[str, int], caller: str, value: int) -> None:
    """Notes a value for a caller, and forgets the oldest note where there are too many."""
    notes[caller] = value
    notes.move_to_end(caller)
    if len(notes) > _MAX_REMEMBERED:
        notes.popitem(last=False)
