"""How many processors there are for a process: what decides on threads and on further processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

AFFINITY = os.sched_getaffinity(0)  # of the process, before any thread was pinned
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
        return len(AFFINITY)
    return max(1, min(len(AFFINITY), allowed))
