"""The C heap, which by itself keeps much of what one large request took."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

import psutil

from engine.protocol.c_heap import limit_arenas, trim

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE_BYTES = 16 << 20
_KEPT_BYTES = 32 << 20
_SOON_S = 1.0  # after a large request: by then it is answered, and what it took is free


def keep_pages() -> None:
    """Has the heap keep the pages of large requests for the next ones, up to some megabytes.

    A page that is new to a process costs more than what is written to it: a body of 2 MB is copied
    in 0.1 ms to pages that were there, and in 1.1 ms to others, with the interpreter's lock. By
    default glibc takes new ones for each large block, and gives them back when it is freed.

    To be called before threads start.
    """
    limit_arenas()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)


class _Process:
    """This process's heap: how many bytes were resident after it last gave some back."""

    trimmed_bytes = 0


def trim_if_grown() -> None:
    """Gives back what is free, if the process has grown by more than is kept since it last did."""
    process = psutil.Process()
    if process.memory_info().rss > _Process.trimmed_bytes + _KEPT_BYTES:
        trim()
        _Process.trimmed_bytes = process.memory_info().rss


def collect_and_trim() -> None:
    """The same, also with what only the garbage collector finds.

    Errors hold frames, and frames errors and bodies of requests. Those of calls are cleared
    (`api/interceptor.py`); others would stay until enough small objects are made.
    """
    gc.collect(1)  # a second after: no object of it is old, and those that are take 10 to 25 ms
    trim_if_grown()


class Later:
    """Calls a function in a thread some time after large requests have ended, once for all of them.

    Args:
        function: `trim_if_grown` or `collect_and_trim`.
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
