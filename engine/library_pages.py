"""Gives back the code of libraries that only their loading has run.

Of torch's libraries most pages that a process sees are of initialisers, which run once: they fill
the tables of operations. The system keeps such pages as long as there is room, and counts them as
the process's. Given back, those that are run again are mapped again, from the page cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")  # of Linux
_MADV_DONTNEED = 4  # mman.h
_MIN_KIB = 512  # less is not worth a call


def give_back_library_pages() -> int:
    """Unmaps the pages of code that was read from files.

    Returns:
        Bytes of them; some come back when they are run.
    """
    try:
        lines = _SMAPS.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    given = 0
    for begin, end, resident in _code(lines):
        address, size = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
        if libc.madvise(address, size, _MADV_DONTNEED) == 0:
            given += resident
    return given


def _code(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """Begin, end and resident bytes of code as its file has it.

    Pages that are not as in the file (`Anonymous`) would be lost, so such code is left out: a
    debugger may have put a breakpoint there.
    """
    begin = end = resident = 0
    for line in lines:
        first, *others = line.split()
        if not first.endswith(":"):  # a mapping begins: addresses, permissions, …, path
            is_code = others[0] == "r-xp" and len(others) > 4 and others[4].startswith("/")
            begin, end = (int(part, 16) for part in first.split("-")) if is_code else (0, 0)
        elif first == "Rss:":
            resident = int(others[0])
        elif first == "Anonymous:" and begin and others[0] == "0" and resident >= _MIN_KIB:
            yield begin, end, resident * 1024
