"""The processors that the engine's threads run on."""

from __future__ import annotations

import logging
import os

from .protocol.processors import AFFINITY

logger = logging.getLogger(__name__)


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
    if kernels is not None and num_threads == len(AFFINITY):
        kernels.pin_threads(sorted(AFFINITY))
        logger.info("one thread on each of %d processors", num_threads)


def unpin() -> None:
    """Lets the calling thread run on any processor of the process again."""
    os.sched_setaffinity(0, AFFINITY)
