"""The service's end of the engine's socket.

One reader task receives a message per engine step and gives each request its output. When the
connection is lost the streams wait; a new engine gets each request again with the tokens generated
so far, and continues where the old one stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from engine.protocol import wire
from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.config import EngineInfo
from engine.protocol.errors import AdapterError
from engine.protocol.request import Request, SequenceOutput, StepOutput

from ..call_record import CallRecord
from ..errors import unhealthy
from .engine_stream import Stream, open_stream
from .tally import Tally

logger = logging.getLogger(__name__)

StepListener = Callable[[StepOutput], None]
TallyListener = Callable[[Tally], None]

_RECONNECT_S = 0.1
_NOTICE_S = 1.5  # without progress of the engine; callers of Health see it half a second later
_MAX_RESTARTS = 3  # engine deaths of which a request may be the cause, and then fails


class EngineClient:
    """A connection to the engine that is opened again whenever it is lost.

    Args:
        socket_path: the engine's socket.
        max_waiting_s: how long a request may wait for its first step; None sets no bound.
    """

    def __init__(self, socket_path: Path, *, max_waiting_s: float | None = None) -> None:
        self._socket_path = socket_path
        self._max_waiting_s = max_waiting_s
        self._streams: dict[str, Stream] = {}
        self._last_words = ""  # for all requests, once they are to end
        self.num_active = 0  # requests that the engine computes for this client, or will
        # In containers every service may have the same process id.
        prefix = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._ids = (f"{prefix}-{number}" for number in itertools.count())
        self._writer: asyncio.StreamWriter | None = None
        self.is_leaving = False  # the engine finishes what it has, and takes no more
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._greeted = -math.inf  # when an engine last said that it is ready
        self.progress = -math.inf  # when the engine last got on, as far as is known
        self._numbers = itertools.count(1)  # of requests to load or unload adapters
        self._settling: dict[int, asyncio.Future[None]] = {}
        self._restoring: set[int] = set()  # of those that a new engine was sent
        self.listed: tuple[AdapterInfo, ...] = ()  # adapters, as the engine said last
        self.adapters: Mapping[str, AdapterInfo] = {}  # by name; replaced, never changed
        self.info: EngineInfo | None = None
        self.last_step = StepOutput()
        self.on_step: list[StepListener] = []
        self.on_tally: list[TallyListener] = []
        self.on_restart: list[Callable[[EngineInfo], None]] = []
        self.on_loss: list[Callable[[], None]] = []
        # Which adapters an engine is to have that has just connected, given whether it is the
        # first. None: those that it has.
        self.wanted_adapters: Callable[[bool], Mapping[str, AdapterInfo] | None] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the connection to an engine is open."""
        return self._writer is not None

    @property
    def has_greeted(self) -> bool:
        """Whether an engine has said on the open connection that it is ready."""
        return self.is_connected and self.progress > -math.inf

    @property
    def is_healthy(self) -> bool:
        """Whether an engine is connected and gets on: idle or busy, it says so all the time."""
        gets_on = time.monotonic() - self.progress < _NOTICE_S
        return self.is_connected and gets_on and not self.is_leaving

    def start(self) -> None:
        """Starts the task that connects and reads."""
        self._task = asyncio.create_task(self._run(), name="engine client")

    async def ready(self) -> EngineInfo:
        """Waits for the first engine and returns its description."""
        await self._ready.wait()
        assert self.info is not None
        return self.info

    async def close(self) -> None:
        """Ends the connection; requests that still run fail."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self.end_streams("the server is shutting down")

    def end_streams(self, reason: str) -> None:
        """Fails all requests that still run, and those that are still to come."""
        self._last_words = reason
        self._fail_streams(reason, min_restarts=0)

    def new_request_id(self) -> str:
        """An id that no other request has."""
        return next(self._ids)

    def generate(
        self, request: Request, on_end: Callable[[], object] = lambda: None
    ) -> AsyncGenerator[SequenceOutput]:
        """Yields a request's output of each step until it ends. Closing the iterator aborts it.

        Args:
            request: the request.
            on_end: is called when the engine is done with it, which may be long before its last
                output is read.

        Raises:
            ServiceError: no engine is connected, the call was aborted, or the request has waited
                too long for its first step.
        """
        return open_stream(request, on_end).outputs(self.submit, self._max_waiting_s)

    def submit(self, stream: Stream) -> None:
        """Gives the engine a request.

        Raises:
            ServiceError: no engine is connected.
        """
        if self._writer is None or self.is_leaving:
            raise unhealthy()
        self._streams[stream.request_id] = stream
        self.num_active += 1
        stream.owner = self
        if self._last_words:
            _fail(stream, self._last_words)
        elif self.has_greeted:  # else it is sent when the engine does
            self._send(wire.submit(stream.to_engine()))

    def release(self, stream: Stream) -> None:
        """Takes a request from the engine."""
        del self._streams[stream.request_id]
        if not stream.ended:
            self.num_active -= 1
            self._send(wire.abort(stream.request_id))

    def ended(self) -> None:
        """The engine has ended a request, or it has failed."""
        self.num_active -= 1

    def unfinished(self) -> list[Stream]:
        """The requests that the engine has not ended."""
        return [stream for stream in self._streams.values() if not stream.ended]

    async def load_adapter(self, wanted: LoadAdapter) -> AdapterInfo | None:
        """Loads an adapter; afterwards it is one of `adapters`.

        Returns:
            The adapter; None if it was unloaded at once.

        Raises:
            AdapterError: it cannot be loaded.
            ServiceError: no engine is connected, or it ended.
        """
        await self._settled(partial(wire.load, wanted=wanted))
        return next((one for one in self.listed if one.name == wanted.name), None)

    async def unload_adapter(self, name: str, call: str = "") -> None:
        """Takes an adapter away, for a call; the requests that use it end first.

        Raises:
            AdapterError: there is none of this name.
            ServiceError: no engine is connected, or it ended.
        """
        await self._settled(partial(wire.unload, name=name, call=call))

    async def _settled(self, message: Callable[[int], bytes]) -> None:
        if self._writer is None:
            raise unhealthy()
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._settling[number] = future
        try:
            self._send(message(number))
            await future
        finally:
            del self._settling[number]

    def abort(self, call: CallRecord) -> None:
        """Fails the requests of a call."""
        for stream in self._streams.values():
            if stream.call is call:
                stream.abort()

    async def _run(self) -> None:
        """Connects, reads until the connection is lost, and connects again."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._socket_path)
            except OSError:
                await asyncio.sleep(_RECONNECT_S)
                continue
            try:
                await self._read(reader)
            except (OSError, asyncio.IncompleteReadError):
                if self.has_greeted:
                    logger.warning("the engine is gone; %d requests wait", len(self._streams))
            except (ValueError, TypeError):
                logger.exception("the engine sent a message that cannot be read")
            finally:
                has_died = self.has_greeted and not self.is_leaving
                self._writer.close()
                self._writer = None
                self.is_leaving = False
                self.progress = -math.inf
                self._restoring.clear()
                for future in self._settling.values():
                    if not future.done():
                        future.set_exception(unhealthy())
            if has_died:  # a process that is ending may still accept a connection
                for stream in self._streams.values():
                    stream.num_restarts += stream.lose_engine(self._greeted)
            self._fail_streams("the engine died too often", min_restarts=_MAX_RESTARTS)
            for lost in self.on_loss:
                lost()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
            kind, fields = wire.parse(await reader.readexactly(size))
            quiet_s = wire.parse_beat(fields) if kind is wire.Kind.BEAT else 0.0
            self.progress = time.monotonic() - quiet_s
            if kind is wire.Kind.READY:
                self._greeted = self.progress
                self._resume(wire.parse_info(fields))
            elif kind is wire.Kind.STEP:
                self._deliver(wire.parse_step(fields))
            elif kind is wire.Kind.TAKEN:
                self._note_taken(wire.parse_id(fields))
            elif kind is wire.Kind.LEAVING:
                self.is_leaving = True
            elif kind is wire.Kind.ADAPTERS:
                self._list(wire.parse_adapters(fields))
            elif kind is wire.Kind.SETTLED:
                self._settle(*wire.parse_settled(fields))

    def _resume(self, info: EngineInfo) -> None:
        before, self.info = self.info, info
        self._ready.set()
        is_new = before is not None and before.instance != info.instance
        if is_new:
            for restarted in self.on_restart:
                restarted(info)
        self.listed = info.adapters
        wanted = self.adapters if is_new else None
        if self.wanted_adapters is not None:
            wanted = self.wanted_adapters(before is None)
        if wanted is not None:  # first, since the requests below may have these adapters
            self.restore_adapters(wanted)
        self._list(info.adapters)
        for stream in self.unfinished():
            self._send(wire.submit(stream.to_engine()))

    def restore_adapters(self, wanted: Mapping[str, AdapterInfo]) -> None:
        """Has the engine load and unload adapters, until it has those that are wanted, by name."""
        started = {one.name: one for one in self.listed}
        for name in started.keys() - wanted.keys():
            self._send_restoring(partial(wire.unload, name=name))
        for name, one in wanted.items():
            now = started.get(name)
            if now is not None and one.digest != now.digest and one.source == now.source:
                logger.warning("the files of the adapter %s have changed", name)
            elif now is None or one.digest != now.digest:
                again = LoadAdapter(name=name, source=one.source, replaces=True, digest=one.digest)
                self._send_restoring(partial(wire.load, wanted=again))

    def _send_restoring(self, message: Callable[[int], bytes]) -> None:
        number = next(self._numbers)
        self._restoring.add(number)
        self._send(message(number))

    def _settle(self, number: int, error: AdapterError | None) -> None:
        if number in self._restoring:
            self._restoring.discard(number)
            if error is not None:
                logger.error("an adapter is lost: %s", error)
            self._list(self.listed)
        future = self._settling.get(number)
        if future is not None and not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _list(self, listed: tuple[AdapterInfo, ...]) -> None:
        """Notes which adapters there are; until all are back, those that there were."""
        self.listed = listed
        if not self._restoring:
            self.adapters = {one.name: one for one in listed}

    def _note_taken(self, request_id: str) -> None:
        if (stream := self._streams.get(request_id)) is not None:
            stream.is_taken = True

    def _deliver(self, step: StepOutput) -> None:
        self.last_step = step
        for moment in step.moments:
            if (stream := self._streams.get(moment.request_id)) is not None:
                stream.timeline.note(moment)
        tally = Tally(time.monotonic())
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else it was aborted before this arrived
                stream.push(output)
                tally.add(stream.pace, output)
        for listener in self.on_step:
            listener(step)
        if step.outputs:
            for tally_listener in self.on_tally:
                tally_listener(tally)

    def _send(self, message: bytes) -> None:
        if self._writer is not None:
            self._writer.write(message)

    def _fail_streams(self, reason: str, *, min_restarts: int) -> None:
        for stream in self._streams.values():
            if stream.num_restarts >= min_restarts and not stream.ended:
                _fail(stream, reason)


def _fail(stream: Stream, reason: str) -> None:
    stream.push(SequenceOutput(request_id=stream.request.request_id, error=reason))
