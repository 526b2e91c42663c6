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

    A container's CPU quota counts as well: more threads than it allows are all throttled together
    for a part of every period.
    """
    try:
        quota, period = _CPU_MAX.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # there is no quota
        return len(_AFFINITY)
    return max(1, min(len(_AFFINITY), allowed))


def pin(num_threads: int) -> None:
    """Pins the calling thread and the OpenMP threads that compute for it to a processor each.

    These threads wait for each other a hundred times a step. Left to itself, Linux puts two of them
    onto one processor while a process of low priority runs on the other: beside one at the lowest
    priority steps took thirty times as long. Nothing is pinned unless there are as many threads as
    processors, since other processes may want to choose theirs too. Threads that the caller starts
    afterwards inherit its processor and must call `unpin`.
    """
    from .kernels import cpu as cpu_kernels  # here, since it imports torch and `unpin` needs none

    kernels = cpu_kernels.load()
    if kernels is not None and num_threads == len(_AFFINITY):
        kernels.pin_threads(sorted(_AFFINITY))
        logger.info("one thread on each of %d processors", num_threads)


def unpin() -> None:
    """Lets the calling thread run on any processor of the process again."""
    os.sched_setaffinity(0, _AFFINITY)
