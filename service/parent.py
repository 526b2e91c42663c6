"""What binds a process to others: it dies with its parent, and not with a terminal."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """Returns a function that has the calling process killed when its parent ends.

    The child calls it, before or after exec. The result is None on systems other than Linux.

    Args:
        parent: the parent's process id; the child exits at once if that process has ended.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # not in `bind`: a forked child should do little

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return bind


def ignore_hangup(*_: object) -> None:
    """Handles SIGHUP: a terminal has closed, or somebody expects settings to be read again."""
    logger.warning("SIGHUP is ignored: settings are read at the start only, keys when they change")
