"""How much memory there is for a process: of the machine, or of what a container may take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can still be allocated without swapping, or being killed for them.

    Pages of files count as free: the system gives them back before it kills.
    """
    of_machine = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        kinds = dict(row.split() for row in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no limit
        return of_machine
    files = sum(int(kinds.get(kind, 0)) for kind in ("active_file", "inactive_file"))
    return max(0, min(of_machine, limit - used + files))
