"""Permits that several service processes count together, without waiting for each other.

Each process writes what it holds into a piece of shared memory of its own, and reads those of the
others. Nobody takes a lock, so a process that is frozen or killed holds up nobody: what a dead one
holds does not count, what a frozen one holds does. Two processes that grant a permit within the
same tens of microseconds may not see each other's.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgpack

from ..launch.place import Place

# Process id, length of what follows, and its checksum: a reader may come while it is written.
_HEADER = struct.Struct("<III")
_MAX_ENTRY_BYTES = 160  # a caller's name of 128 characters and a number, as msgpack has them
_NUM_READS = 3  # of something that is being written, after which the last one counts


class SharedPermits:
    """What the service processes hold, by the caller.

    Args:
        place: of this process.
        max_held: permits that one process holds at most.
    """

    def __init__(self, place: Place, max_held: int) -> None:
        size = _HEADER.size + 16 + _MAX_ENTRY_BYTES * max_held
        self._own = _opened(_path(place, place.number), size)
        self._others = [_Other(_path(place, number), size) for number in place.others]
        self.publish({})

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return 1 + len(self._others)

    def publish(self, held: Mapping[str, int]) -> None:
        """Shows the others what this process holds."""
        body = msgpack.packb(dict(held))
        _HEADER.pack_into(self._own, 0, os.getpid(), len(body), zlib.crc32(body))
        self._own[_HEADER.size : _HEADER.size + len(body)] = body

    def elsewhere(self) -> Counter[str]:
        """What the others hold, as far as they live."""
        total: Counter[str] = Counter()
        for other in self._others:
            total.update(other.held())
        return total


class _Other:
    """What another process holds."""

    def __init__(self, path: Path, size: int) -> None:
        self._memory = _opened(path, size)
        self._header = b""  # of what was read last
        self._held: dict[str, int] = {}

    def held(self) -> Mapping[str, int]:
        """By the caller; nothing if it is dead."""
        for _ in range(_NUM_READS):
            header = self._memory[: _HEADER.size]
            if header == self._header or self._read(header):
                break
        process = _HEADER.unpack(self._header or bytes(_HEADER.size))[0]
        return self._held if _is_alive(process) else {}

    def _read(self, header: bytes) -> bool:
        """Reads what it holds now; false if that is just being written."""
        _, length, checksum = _HEADER.unpack(header)
        body = self._memory[_HEADER.size : _HEADER.size + length]
        if zlib.crc32(body) != checksum:
            return False
        self._held, self._header = msgpack.unpackb(body) if body else {}, header
        return True


def _path(place: Place, number: int) -> Path:
    return place.directory / f"permits-{number}"


def _opened(path: Path, size: int) -> mmap.mmap:
    """Shared memory behind a file, which whoever comes first makes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _is_alive(process: int) -> bool:
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
