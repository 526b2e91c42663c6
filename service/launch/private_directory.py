"""A private directory for sockets and generated files, removed even after a SIGKILL.

Each directory has a lock that its process holds while it lives. Whoever makes a directory removes
those of the same user whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "tokenwire-"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class PrivateDirectory:
    """A directory that is ours while `lock`, a file descriptor, is open."""

    path: Path
    lock: int


def make() -> PrivateDirectory:
    """Makes a directory with mode 0700, and removes what dead processes have left.

    Raises:
        OSError: there is no place for it.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = _lock(path)
        if lock is not None and (path / _LOCK).exists():  # else another process has removed it
            return PrivateDirectory(path, lock)


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for the length of a block.

    Raises:
        OSError: there is no place for it.
    """
    directory = make()
    try:
        yield directory.path
    finally:
        shutil.rmtree(directory.path, ignore_errors=True)
        os.close(directory.lock)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # of another user, or just removed
            if path.parent.stat().st_uid == os.getuid() and (lock := _lock(path.parent)):
                shutil.rmtree(path.parent, ignore_errors=True)
                os.close(lock)


def _lock(directory: Path) -> int | None:
    """Locks a directory; returns None if it is locked already."""
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
