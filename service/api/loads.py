"""How busy the server is, told once or again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from ..codec import convert
from ..codec.presenter import Reply
from ..errors import overloaded, unhealthy
from ..generation.load import LoadMeter, watch_interval
from ..generation.pipeline import Pipeline
from .call import Call

_MAX_WATCHERS = 128


class Loads:
    """Tells callers the load.

    Args:
        meter: knows it.
        pipeline: knows when the server shuts down.
    """

    def __init__(self, meter: LoadMeter, pipeline: Pipeline) -> None:
        self._meter = meter
        self._pipeline = pipeline
        self._num_watchers = 0

    def now(self) -> Reply:
        """The load now."""
        return convert.load_response(self._meter.load())

    async def watch(self, interval: float | None, call: Call) -> AsyncGenerator[Reply]:
        """The load, again and again.

        Raises:
            ServiceError: the interval has not a possible value, too many callers watch, or the
                server shuts down.
        """
        interval_s = watch_interval(interval)
        if self._num_watchers >= _MAX_WATCHERS:
            raise overloaded()
        self._num_watchers += 1
        try:
            async with aclosing(self._loads(interval_s)) as loads:
                call.end_unread_by(loads.aclose)
                async for load in loads:
                    yield load
            raise call.failure or unhealthy()
        finally:
            self._num_watchers -= 1

    async def _loads(self, interval_s: float) -> AsyncGenerator[Reply]:
        """The load, until the server shuts down."""
        while True:
            yield self.now()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._pipeline.closed(), interval_s)
                return
