"""Limits how many generations run at a time. A request above the limit is refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import overloaded, unhealthy


class Admission:
    """A fixed number of permits, one per generation.

    It is used from one event loop only, so it needs no lock.
    """

    def __init__(self, max_concurrent_requests: int) -> None:
        self._max = max_concurrent_requests
        self._closed = asyncio.Event()
        self.num_active = 0

    @contextmanager
    def permit(self, count: int = 1) -> Iterator[Permit]:
        """Holds `count` permits, until the end or until they are released before it.

        Raises:
            ServiceError: there are not so many left, or the server is shutting down.
        """
        if self._closed.is_set():
            raise unhealthy()
        if self.num_active + count > self._max:
            raise overloaded()
        permit = Permit(self, count)
        self.num_active += count
        try:
            yield permit
        finally:
            permit.release()

    def close(self) -> None:
        """Refuses all further permits; those held already stay valid."""
        self._closed.set()

    async def closed(self) -> None:
        """Returns once further permits are refused."""
        await self._closed.wait()


@dataclass(slots=True)
class Permit:
    """Permits that one request holds."""

    _admission: Admission
    _count: int

    def release(self) -> None:
        """Gives the permits back, once: a caller that still reads holds none."""
        self._admission.num_active -= self._count
        self._count = 0
