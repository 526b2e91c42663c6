"""What a service process asks of its siblings, and answers them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgpack
from prometheus_client.core import Metric

from ..errors import unanswered
from ..launch.place import Place
from .line import Line
from .series import SharedSeries

_STORE, _ABORT = "Store", "Abort"

# How long a process that does not answer is waited for. What it has counted before is known without
# it; whether a call runs there is not.
_STORE_PATIENCE_S, _ABORT_PATIENCE_S = 2.0, 10.0

# Ends the calls of an id as a caller asked for it, and returns how many there were.
Abort = Callable[[str, str | None], int]


class Siblings:
    """The other service processes of this one's engine.

    Args:
        place: of this process.
        series: of this process and all.
        abort: ends calls of this process.
    """

    def __init__(self, place: Place, series: SharedSeries, abort: Abort) -> None:
        self._place = place
        self._series = series
        self._abort = abort
        self._line = Line(place, {_STORE: self._on_store, _ABORT: self._on_abort})

    async def open(self) -> None:
        """Begins to answer the others."""
        await self._line.open()

    async def close(self) -> None:
        """Leaves what this process has counted to the others, and ends answering."""
        await asyncio.to_thread(self._series.store)
        await self._line.close()

    async def abort(self, request_id: str, caller: str | None, num_own: int = 0) -> int:
        """Ends the calls of an id that the others serve.

        Args:
            request_id: the calls' id.
            caller: who asks for that, if it is known.
            num_own: calls of that id that this process has ended.

        Returns:
            How many were ended, with its own.

        Raises:
            ServiceError: none, and one of the others does not answer.
        """
        question = msgpack.packb((request_id, caller))
        answers = await self._line.ask(_ABORT, question, patience_s=_ABORT_PATIENCE_S)
        count: int = num_own + sum(map(msgpack.unpackb, answers.by_number.values()))
        if answers.silent and not count:
            raise unanswered()
        return count

    async def series(self) -> Callable[[], Iterable[Metric]]:
        """What makes the series of all processes, in milliseconds: for another thread."""
        answers = await self._line.ask(_STORE, patience_s=_STORE_PATIENCE_S)
        live = frozenset(answers.by_number)
        return lambda: self._series.merged(live)

    def claims_engine(self, instance: str) -> bool:
        """Whether this process is the first to report an engine; all of them meet it."""
        try:
            (self._place.directory / f"engine-{instance}").touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            return False
        return True

    async def _on_store(self, _: bytes) -> bytes:
        await asyncio.to_thread(self._series.store)
        return b""

    async def _on_abort(self, question: bytes) -> bytes:
        request_id, caller = msgpack.unpackb(question)
        count: bytes = msgpack.packb(self._abort(request_id, caller))
        return count
