"""Where requests are read and prepared: small ones at once, others one after the other in threads.

Callers take turns.
Reading a request holds the interpreter's lock. So of all requests that take longer than a few
milliseconds at most two are read at a time: one of middle size, and one large one, for which those
of middle size do not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

from .budget import ByteBudget
from .heap import Later, collect_and_trim
from .turns import Turns

LARGE_BYTES = 128 * 1024  # from here on a request is large
# Of large requests together: five million tokens a second, more than an engine takes. Who sends
# more would keep Envoy and the event loop busy with bytes.
_LARGE_BYTES_PER_S = 20e6

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Lanes:
    """A thread for requests of middle size and one for large ones.

    Args:
        max_bytes: of the requests that wait in each lane; more are refused.
    """

    def __init__(self, max_bytes: int) -> None:
        self._middle = _Lane("middle", max_bytes)
        self._large = _Lane("large", max_bytes)
        self._trimming = Later(collect_and_trim)

    async def run(
        self, num_bytes: int, small_bytes: int, function: Callable[[*_Ts], _T], *args: *_Ts
    ) -> _T:
        """Calls a function that reads a request of `num_bytes`: up to `small_bytes` at once.

        Raises:
            ServiceError: overloaded: too much waits already.
        """
        return await self._run(num_bytes, num_bytes, small_bytes, function, *args)

    async def run_read(
        self, num_bytes: int, small_bytes: int, function: Callable[[*_Ts], _T], *args: *_Ts
    ) -> _T:
        """The same for a request that was read: it does not count again for the rate.

        Raises:
            ServiceError: overloaded: too much waits already.
        """
        return await self._run(num_bytes, 0, small_bytes, function, *args)

    async def _run(
        self,
        num_bytes: int,
        unread_bytes: int,
        small_bytes: int,
        function: Callable[[*_Ts], _T],
        *args: *_Ts,
    ) -> _T:
        if num_bytes <= small_bytes:
            return function(*args)
        if num_bytes <= LARGE_BYTES:
            return await self._middle.run(num_bytes, 0, function, *args)
        try:
            return await self._large.run(num_bytes, unread_bytes, function, *args)
        finally:
            self._trimming.soon()

    def close(self) -> None:
        """Ends the threads."""
        self._trimming.cancel()
        for lane in (self._middle, self._large):
            lane.executor.shutdown(wait=False, cancel_futures=True)


class _Lane:
    def __init__(self, name: str, max_bytes: int) -> None:
        self._next_at = 0.0  # on the loop's clock
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-requests")
        self._budget = ByteBudget(max_bytes)
        self._turns = Turns(1)

    async def run(
        self, num_bytes: int, unread_bytes: int, function: Callable[[*_Ts], _T], *args: *_Ts
    ) -> _T:
        """Calls a function in turn; of its bytes those count for the rate that are not read yet."""
        loop = asyncio.get_running_loop()
        with self._budget.hold(num_bytes):
            async with self._turns.place():
                if unread_bytes:
                    await asyncio.sleep(self._next_at - loop.time())  # nothing, if that is over
                    self._next_at = loop.time() + unread_bytes / _LARGE_BYTES_PER_S
                return await loop.run_in_executor(self.executor, function, *args)
