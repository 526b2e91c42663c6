"""The C heap, which by itself keeps much of what one large request took."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
_LARGE_BYTES = 1 << 20
_MAX_ARENAS = 2


def give_back_large_blocks() -> None:
    """Has every large block go back to the system when it is freed. By default glibc learns not to.

    To be called before threads start.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def trim() -> None:
    """Gives what is free back to the system."""
    libc = ctypes.CDLL(None)  # its calls do not hold the interpreter's lock
    if hasattr(libc, "malloc_trim"):  # not every C library has it
        libc.malloc_trim(0)


def collect_and_trim() -> None:
    """The same, also with what only the garbage collector finds.

    An error and the frames that it went through hold each other, and with them the body of the
    request: refused requests of megabytes would stay until enough small objects are made.
    """
    gc.collect()  # 10 to 25 ms, since what is there from the start is frozen
    trim()
