"""Places that callers take in turn, whoever came first and with however many requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..call_record import current_record

_Waiting = deque["asyncio.Future[None]"]


class Turns:
    """A number of places: for threads or processes that work for all callers.

    A caller with a hundred requests waits for them; another one's first request is next but one.
    It is used from one event loop only, so it needs no lock.

    Args:
        num_places: how many requests hold one at a time.
    """

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()  # by caller, the next one first

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place to the end of a block, once it is the current caller's turn."""
        await self._take()
        try:
            yield
        finally:
            self._give_back()

    async def _take(self) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        record = current_record()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault("" if record is None else record.caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came at the same moment
                self._give_back()
            raise

    def _give_back(self) -> None:
        """Passes a place on to the next caller."""
        while self._waiting:
            caller, waiting = self._waiting.popitem(last=False)
            turn = waiting.popleft()
            if waiting:
                self._waiting[caller] = waiting  # behind all others
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
