"""The C heap, which by itself keeps much of what one large request took."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

from engine.protocol.c_heap import limit_arenas, trim

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE_BYTES = 1 << 20
_SOON_S = 1.0  # after a large request: by then it is answered, and what it took is free


def give_back_large_blocks() -> None:
    """Has every large block go back to the system when it is freed. By default glibc learns not to.

    To be called before threads start.
    """
    limit_arenas()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)


def collect_and_trim() -> None:
    """The same, also with what only the garbage collector finds.

    Errors hold frames, and frames errors and bodies of requests. Those of calls are cleared
    (`api/interceptor.py`); others would stay until enough small objects are made.
    """
    gc.collect(1)  # a second after: no object of it is old, and those that are take 10 to 25 ms
    trim()


class Later:
    """Calls a function in a thread some time after large requests have ended, once for all of them.

    Args:
        function: `trim` or `collect_and_trim`.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """A large request has ended."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SOON_S, self._call)

    def cancel(self) -> None:
        """Does not call it any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _call(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, self._function)
