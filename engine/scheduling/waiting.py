"""Sequences that wait: callers in turn, and among the sequences of one caller the urgent first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .sequence import Sequence
from .turns import Turns


class WaitingQueue:
    """The waiting sequences of all callers.

    Args:
        turns: says which caller is next.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._heaps: dict[str, list[tuple[int, int, Sequence]]] = {}  # of callers that wait

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, those of a caller in their order."""
        for heap in self._heaps.values():
            yield from (sequence for *_, sequence in sorted(heap))

    def push(self, sequence: Sequence) -> None:
        """Lets a sequence wait: a new one, or one that was preempted."""
        heap = self._heaps.setdefault(sequence.caller, [])
        heapq.heappush(heap, (*sequence.urgency, sequence))

    def first(self) -> Sequence | None:
        """The sequence whose turn it is; None if none waits."""
        if not self._heaps:
            return None
        caller = min(self._heaps, key=self._turns.served)
        return self._heaps[caller][0][-1]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out."""
        heap = self._heaps[sequence.caller]
        entry = (*sequence.urgency, sequence)
        if heap[0] == entry:
            heapq.heappop(heap)
        else:
            heap.remove(entry)
            heapq.heapify(heap)
        if not heap:
            del self._heaps[sequence.caller]
