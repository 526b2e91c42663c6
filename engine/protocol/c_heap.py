"""The heap of the C library, which by itself keeps much of what was freed."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h of glibc
_MAX_ARENAS = 2


def limit_arenas() -> None:
    """Has all threads share two heaps: by default each has its own, and what one frees stays there.

    To be called before threads start.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not every C library has it
        libc.mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def trim() -> None:
    """Gives what is free back to the system."""
    libc = ctypes.CDLL(None)  # its calls do not hold the interpreter's lock
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
