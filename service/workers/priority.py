"""The lowest priority, for processes whose work may wait."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

_NICENESS = 12  # of the processes' sessions; with less they slow other processes down (measured)
_NUM_TRIES, _RETRY_S = 50, 0.1  # to set it


async def lower_priority(pid: int) -> None:
    """Gives a process the lowest priority, right after its start, while it imports."""
    with suppress(OSError):  # the process may have ended; not every kernel has autogroups
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(_NUM_TRIES):
            if _lower_session(pid):
                return
            await asyncio.sleep(_RETRY_S)


def _lower_session(pid: int) -> bool:
    """Lowers the priority of a process's session; returns False if it has to be tried again.

    With autogroups Linux divides the processors among sessions first, then within each of them. It
    allows ten changes a second, of all users together.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICENESS))
    except BlockingIOError:
        return False
    return True
