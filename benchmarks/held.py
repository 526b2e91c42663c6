"""What the processes of a server hold: memory, open files and threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.processes import role_of

_KIB_FIELDS = ("Rss:", "Pss:", "Private_Clean:", "Private_Dirty:")


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds, or several together.

    Attributes:
        rss: MiB of memory that it sees, pages of files and those of others included.
        pss: MiB of it, each page divided by the number of processes that have it.
        private: MiB that nobody else has, and that its end would free.
        files: open files and sockets.
        threads: of it.
    """

    rss: float = 0.0
    pss: float = 0.0
    private: float = 0.0
    files: int = 0
    threads: int = 0

    @classmethod
    def by(cls, process: psutil.Process) -> Held:
        """What one holds now.

        Raises:
            psutil.Error: it has ended.
            OSError: it has ended, or its memory may not be seen.
        """
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split()[0]: int(line.split()[1]) for line in lines}
        rss, pss, clean, dirty = (kib[name] / 1024 for name in _KIB_FIELDS)
        return cls(rss, pss, clean + dirty, process.num_fds(), process.num_threads())

    def __add__(self, other: Held) -> Held:
        """What both hold."""
        return Held(
            self.rss + other.rss,
            self.pss + other.pss,
            self.private + other.private,
            self.files + other.files,
            self.threads + other.threads,
        )


def by_role(supervisor: psutil.Process) -> dict[str, Held]:
    """What the processes of a server hold, by what they are; a service's workers together.

    Args:
        supervisor: the process of `tokenwire serve`.
    """
    found = {"supervisor": Held.by(supervisor)}
    for child in supervisor.children():
        role = role_of(child)
        found[role] = Held.by(child)
        if role == "service":
            workers = map(_of_worker, child.children(recursive=True))
            found["its workers"] = sum(workers, Held())
    return found


def _of_worker(process: psutil.Process) -> Held:
    """What a worker holds; nothing if it has just ended, as those may that had too much to do."""
    try:
        return Held.by(process)
    except (psutil.Error, OSError, KeyError):
        return Held()
