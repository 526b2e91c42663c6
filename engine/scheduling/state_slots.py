"""Which slots have the states of running sequences, and which keep those of prefixes.

A state that is kept has a name, as a full block has. Its slot is free all the same, and keeps its
content until it is given away. The slots of states that were used least recently go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class StateSlots:
    """The slots 0 … num_slots - 1.

    Args:
        num_slots: of all uses together.
        num_copies: of these, the most that are taken for copies. The others are for sequences.
    """

    def __init__(self, num_slots: int, num_copies: int) -> None:
        self.num_slots = num_slots
        self.num_copies = num_copies
        self._num_taken_copies = 0
        self._blank = [*reversed(range(num_slots))]
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first

    @property
    def num_free(self) -> int:
        """Slots that can be taken for sequences, those with kept states included."""
        return len(self._blank) + len(self._kept) - (self.num_copies - self._num_taken_copies)

    def take(self) -> int:
        """The slot for a sequence's state."""
        return self._blank.pop() if self._blank else self._kept.popitem(last=False)[1]

    def release(self, slot: int) -> None:
        """Frees a slot whose content is of no use."""
        self._blank.append(slot)

    def take_copy(self) -> int | None:
        """The slot for a copy of a sequence's state; None if there are as many as there may be."""
        if self._num_taken_copies == self.num_copies:
            return None
        self._num_taken_copies += 1
        return self.take()

    def release_copy(self, slot: int) -> None:
        """Frees the slot of a copy that is of no use."""
        self._num_taken_copies -= 1
        self.release(slot)

    def keep(self, slot: int, name: bytes) -> None:
        """Frees the slot of a copy and names it, so that it is found until it is given away."""
        self.forget(name)
        self._num_taken_copies -= 1
        self._kept[name] = slot

    def find(self, name: bytes) -> int | None:
        """The slot with the state of this name, which counts as used now."""
        slot = self._kept.get(name)
        if slot is not None:
            self._kept.move_to_end(name)
        return slot

    def forget(self, name: bytes) -> None:
        """Removes a name, if there is a state of it."""
        slot = self._kept.pop(name, None)
        if slot is not None:
            self.release(slot)

    def check_integrity(self, of_sequences: Iterable[int], of_copies: Iterable[int]) -> None:
        """Asserts that no slot is lost or taken twice."""
        copies = [*of_copies]
        free = [*self._blank, *self._kept.values()]
        assert sorted([*of_sequences, *copies, *free]) == [*range(self.num_slots)]
        assert len(copies) == self._num_taken_copies
