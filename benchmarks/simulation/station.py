"""Processors with one queue: Envoy, and the service processes of a replica."""

from __future__ import annotations

import heapq


class Station:
    """Serves jobs in the order in which they come, each on the processor that is free first.

    That is the queue G/G/c, by Lindley's recursion: a job begins when it has come and a processor
    is free (D. V. Lindley, The theory of queues with a single server, 1952).

    Args:
        num_cores: processors.
    """

    def __init__(self, num_cores: int) -> None:
        self.num_cores = num_cores
        self.busy_s = 0.0
        self._free_at = [0.0] * num_cores

    @property
    def idle_from(self) -> float:
        """The second from which on nothing is left to do, as far as is known."""
        return max(self._free_at)

    def finish(self, now: float, work_s: float) -> float:
        """Takes a job of so many seconds, no earlier than the one before; returns when it ends."""
        ended = max(now, self._free_at[0]) + work_s
        heapq.heapreplace(self._free_at, ended)
        self.busy_s += work_s
        return ended
