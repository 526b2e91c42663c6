"""The calls that run, so that the end of the last one can be waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class CallsInProgress:
    """Counts calls; used from one event loop only, so it needs no lock."""

    def __init__(self) -> None:
        self._num_running = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Counts a call while it runs."""
        self._num_running += 1
        self._none.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._none.set()

    async def none(self) -> None:
        """Returns when no call runs."""
        await self._none.wait()
