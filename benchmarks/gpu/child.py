"""Runs a command in a process of its own, and ends everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TAIL = 800  # characters of what it said last


def finished(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Runs a command from the root of the repository.

    What it leaves behind is killed: an engine in a process of its own would hold the device's
    memory, and whatever comes next would not fit beside it.

    Raises:
        TimeoutError: it was not done in time; the message has what it said last.
    """
    started = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = None
    try:
        said = started.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    if said is None:
        tail = "\n".join(part.strip() for part in started.communicate())[-_TAIL:].strip()
        raise TimeoutError(f"not done after {limit_s:.0f} s: {tail}")
    return subprocess.CompletedProcess(command, started.returncode, *said)
