"""The processors that the engine's threads run on."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_AFFINITY = os.sched_getaffinity(0)  # of the process, before any thread was pinned
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max period"


def num_processors() -> int:
    """Processors that this process may keep busy, at least 1.

    A container's quota counts as well: with more threads than it pays for, all of them are stopped
    together for a part of every period.
    """
    try:
        quota, period = _CPU_MAX.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # there is none
        return len(_AFFINITY)
    return max(1, min(len(_AFFINITY), allowed))


def pin(num_threads: int) -> None:
    """Gives the calling thread and those that compute for it a processor each.

    They wait for each other a hundred times a step. Left to itself, Linux puts two of them onto one
    processor as long as something unimportant runs on the other: steps took thirty times as long
    beside a process at the lowest priority. Nothing happens unless there are as many threads as
    processors, since others may want to choose too. Threads that the caller starts afterwards
    inherit its processor and must call `unpin`.
    """
    from .kernels import cpu as cpu_kernels  # imports torch, which who only unpins need not have

    kernels = cpu_kernels.load()
    if kernels is not None and num_threads == len(_AFFINITY):
        kernels.pin_threads(sorted(_AFFINITY))
        logger.info("one thread on each of %d processors", num_threads)


def unpin() -> None:
    """Lets the calling thread run anywhere again."""
    os.sched_setaffinity(0, _AFFINITY)
