"""The processes of a server that a benchmark has started, and what they take of processors."""

from __future__ import annotations

from pathlib import Path

import psutil

ROLES = ("engine", "service", "envoy", "others")


def by_role() -> dict[str, list[psutil.Process]]:
    """All descendants of this process, by `ROLES`."""
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for item in psutil.Process().children(recursive=True):
        found[role_of(item)].append(item)
    return found


def role_of(process: psutil.Process) -> str:
    """What a process of a server is, by the command that it runs; `others` for a worker.

    Raises:
        psutil.Error: it has ended.
    """
    command = process.cmdline()
    if command and Path(command[0]).name.startswith("envoy"):
        return "envoy"
    if "benchmarks.echo_engine" in command:
        return "engine"
    after = command[command.index("service.cli") + 1 :] if "service.cli" in command else []
    return after[0] if after and after[0] in ROLES else "others"


class Usage:
    """Processor time of processes since this was made.

    Args:
        processes: those to watch; what they took before does not count.
    """

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        self._before = [_seconds(process) for process in processes]

    def seconds(self) -> list[float]:
        """Of each process."""
        return [
            _seconds(process) - before
            for process, before in zip(self._processes, self._before, strict=True)
        ]


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
