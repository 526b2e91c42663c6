"""Processors with one queue: Envoy, and the service processes of a replica."""

from __future__ import annotations

import heapq


class Station:
    """Serves jobs in the order in which they come, each on the processor that is free first.

    That is the queue G/G/c, by Lindley's recursion: a job begins when it has come and a processor
    is free (D. V. Lindley, The theory of queues with a single server, 1952).

    Args:
        num_cores: processors.
        idle_share: the part of a processor that is needed without any job; all jobs take longer.
    """

    def __init__(self, num_cores: int, idle_share: float = 0.0) -> None:
        self.num_cores = num_cores
        self._slower = 1 / (1 - idle_share / num_cores)
        self.busy_s = 0.0
        self._free_at = [0.0] * num_cores

    @property
    def idle_from(self) -> float:
        """The second from which on nothing is left to do, as far as is known."""
        return max(self._free_at)

    def finish(self, now: float, work_s: float) -> float:
        """Takes a job of so many seconds, no earlier than the one before; returns when it ends."""
        took_s = work_s * self._slower
        ended = max(now, self._free_at[0]) + took_s
        heapq.heapreplace(self._free_at, ended)
        self.busy_s += took_s
        return ended
