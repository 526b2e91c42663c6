"""A value made of files, which follows them while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

Stamp = tuple[int, int, int, int] | None


class Watched(Generic[T]):
    """What files say. They are looked at whenever it is asked for, which takes microseconds each.

    A file that was replaced by a broken one, or by none, changes nothing: what was read before
    stays in force, and the log says so once.

    Args:
        what: names the value in the log.
        paths: the files.
        read: reads them; raises OSError or ValueError, whose text is one line.
        read_kept: reads what was in force before this process, in place of one that has ended; None
            if there is no such thing.

    Raises:
        OSError, ValueError: they cannot be read to begin with, and nothing was in force before.
    """

    def __init__(
        self,
        what: str,
        paths: tuple[Path, ...],
        read: Callable[[], T],
        read_kept: Callable[[], T] | None = None,
    ) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._stamps = self._look()  # before reading, so that no later change is missed
        try:
            self._value = read()
        except (OSError, ValueError) as error:
            if read_kept is None:
                raise
            self._value = read_kept()
            self._log_unusable(error)

    def current(self) -> T:
        """The value that is in force now."""
        stamps = self._look()
        if stamps != self._stamps:
            self._stamps = stamps
            self._reload()
        return self._value

    def _look(self) -> list[Stamp]:
        return [_stamp(path) for path in self._paths]

    def _reload(self) -> None:
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            self._log_unusable(error)
        else:
            logger.info("%s changed and were read again", self._what)

    def _log_unusable(self, error: Exception) -> None:
        logger.error("%s changed and cannot be used, the old ones stay: %s", self._what, error)


def _stamp(path: Path) -> Stamp:
    """Differs whenever a file was written or replaced, also behind a symbolic link."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
