"""The service's end of the engine's socket.

One reader task receives a message per engine step and gives each request its output. When the
connection is lost the streams wait; a new engine gets each request again with the tokens generated
so far, and continues where the old one stopped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from engine.protocol import wire
from engine.protocol.adapters import AdapterInfo, LoadAdapter
from engine.protocol.config import EngineInfo
from engine.protocol.errors import AdapterError
from engine.protocol.request import Request, SequenceOutput, StepOutput

from ..call_record import CallRecord, current_record
from ..errors import ServiceError, cancelled, overloaded, unhealthy
from ..timeline import SequenceTimeline
from .tally import Pace, Tally

logger = logging.getLogger(__name__)

StepListener = Callable[[StepOutput], None]
TallyListener = Callable[[Tally], None]

_RECONNECT_S = 0.1
_NOTICE_S = 1.5  # without progress of the engine; callers of Health see it half a second later
_MAX_RESTARTS = 3  # engine deaths at which a request fails: it may be their cause


@dataclass(slots=True)
class _Stream:
    """A request in progress, its outputs so far, and how often the engine was lost."""

    request: Request
    pace: Pace
    call: CallRecord | None = None
    timeline: SequenceTimeline = field(default_factory=SequenceTimeline)
    waiting: deque[SequenceOutput | ServiceError] = field(default_factory=deque)
    reader: asyncio.Future[None] | None = None  # of a caller that waits for an output
    token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_repeated_logprobs: int = 0  # of the prompt, that a new engine will send again
    num_restarts: int = 0
    on_end: Callable[[], object] = lambda: None
    ended: bool = False  # the last output was received; the caller may not have read it yet

    def push(self, output: SequenceOutput) -> None:
        """Queues a step's output, without log-probabilities that an earlier engine sent already."""
        if output.prompt_logprobs:
            fresh = output.prompt_logprobs[self.num_repeated_logprobs :]
            self.num_repeated_logprobs -= len(output.prompt_logprobs) - len(fresh)
            self.num_prompt_logprobs += len(fresh)
            tops = output.prompt_tops[len(output.prompt_logprobs) - len(fresh) :]
            output = output._replace(prompt_logprobs=fresh, prompt_tops=tops)
        if output.token is not None:
            self.token_ids.append(output.token.token_id)
        if output.is_last and not self.ended:
            self.ended = True
            self.on_end()
        self.put(output)

    def put(self, item: SequenceOutput | ServiceError) -> None:
        """Adds an item and wakes the caller, once for all that come before it runs."""
        self.waiting.append(item)
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    async def next(self) -> SequenceOutput:
        """The next output; an `asyncio.Queue` would take three times as long for each.

        Raises:
            ServiceError: the stream has failed.
        """
        while not self.waiting:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        output = self.waiting.popleft()
        if isinstance(output, ServiceError):
            raise output
        return output

    def resumption(self) -> Request:
        """The request for a new engine, which continues after the tokens received so far."""
        generated = (*self.request.resumed_token_ids, *self.token_ids)
        if generated:
            return replace(self.request, resumed_token_ids=generated, prompt_logprobs=False)
        self.num_repeated_logprobs = self.num_prompt_logprobs
        return self.request


class EngineClient:
    """A connection to the engine that is opened again whenever it is lost.

    Args:
        socket_path: the engine's socket.
        max_waiting_s: how long a request may wait for its first step; None sets no bound.
    """

    def __init__(self, socket_path: Path, *, max_waiting_s: float | None = None) -> None:
        self._socket_path = socket_path
        self._max_waiting_s = max_waiting_s
        self._streams: dict[str, _Stream] = {}
        # In containers every service may have the same process id.
        prefix = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._ids = (f"{prefix}-{number}" for number in itertools.count())
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._progress = 0.0  # when the engine last got on, as far as is known
        self._numbers = itertools.count(1)  # of requests to load or unload adapters
        self._settling: dict[int, asyncio.Future[None]] = {}
        self._restoring: set[int] = set()  # of those that a new engine was sent
        self._listed: tuple[AdapterInfo, ...] = ()  # what the engine said last
        self.adapters: dict[str, AdapterInfo] = {}  # by name; replaced, never changed
        self.info: EngineInfo | None = None
        self.last_step = StepOutput()
        self.on_step: list[StepListener] = []
        self.on_tally: list[TallyListener] = []
        self.on_restart: list[Callable[[EngineInfo], None]] = []

    @property
    def is_connected(self) -> bool:
        """Whether the connection to an engine is open."""
        return self._writer is not None

    @property
    def is_healthy(self) -> bool:
        """Whether an engine is connected and gets on: idle or busy, it says so all the time."""
        return self.is_connected and time.monotonic() - self._progress < _NOTICE_S

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
        """Fails all requests that still run."""
        self._fail_streams(reason, min_restarts=0)

    def new_request_id(self) -> str:
        """An id that no other request has."""
        return next(self._ids)

    async def generate(
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
        if self._writer is None:
            raise unhealthy()
        call = current_record()
        stream = _Stream(request, _pace(request, call), call, on_end=on_end)
        self._streams[request.request_id] = stream
        if stream.call is not None:
            stream.call.sequences.append(stream.timeline)
        try:
            self._send(wire.submit(request))
            yield await self._first(stream)
            while stream.waiting or not stream.ended:
                yield await stream.next()
        finally:
            del self._streams[request.request_id]
            stream.timeline.end()
            if not stream.ended:
                self._send(wire.frame(wire.Kind.ABORT, request.request_id))

    async def load_adapter(self, wanted: LoadAdapter) -> AdapterInfo | None:
        """Loads an adapter; afterwards it is one of `adapters`.

        Returns:
            The adapter; None if it was unloaded at once.

        Raises:
            AdapterError: it cannot be loaded.
            ServiceError: no engine is connected, or it ended.
        """
        await self._settled(partial(wire.load, wanted=wanted))
        return next((one for one in self._listed if one.name == wanted.name), None)

    async def unload_adapter(self, name: str) -> None:
        """Takes an adapter away; the requests that use it end first.

        Raises:
            AdapterError: there is none of this name.
            ServiceError: no engine is connected, or it ended.
        """
        await self._settled(partial(wire.unload, name=name))

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
            if stream.call is call and not stream.ended:
                stream.put(cancelled())

    async def _first(self, stream: _Stream) -> SequenceOutput:
        try:
            async with asyncio.timeout(self._max_waiting_s):
                return await stream.next()
        except TimeoutError:
            why = f"the request has waited for {self._max_waiting_s:g} s"
            raise overloaded(why) from None

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
                logger.warning("the engine is gone; %d requests wait", len(self._streams))
            except (ValueError, TypeError):
                logger.exception("the engine sent a message that cannot be read")
            finally:
                self._writer.close()
                self._writer = None
                self._restoring.clear()
                for future in self._settling.values():
                    if not future.done():
                        future.set_exception(unhealthy())
            for stream in self._streams.values():
                stream.num_restarts += 1
                stream.timeline.lose_engine()
            self._fail_streams("the engine died too often", min_restarts=_MAX_RESTARTS)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
            kind, fields = wire.parse(await reader.readexactly(size))
            quiet_s = wire.parse_beat(fields) if kind is wire.Kind.BEAT else 0.0
            self._progress = time.monotonic() - quiet_s
            if kind is wire.Kind.READY:
                self._resume(wire.parse_info(fields))
            elif kind is wire.Kind.STEP:
                self._deliver(wire.parse_step(fields))
            elif kind is wire.Kind.ADAPTERS:
                self._list(wire.parse_adapters(fields))
            elif kind is wire.Kind.SETTLED:
                self._settle(*wire.parse_settled(fields))

    def _resume(self, info: EngineInfo) -> None:
        before, self.info = self.info, info
        self._ready.set()
        if before is not None and before.instance != info.instance:
            for restarted in self.on_restart:
                restarted(info)
            self._restore(info)  # first, since the requests below may have these adapters
        self._list(info.adapters)
        for stream in self._streams.values():
            if stream.num_restarts and not stream.ended:
                self._send(wire.submit(stream.resumption()))

    def _restore(self, info: EngineInfo) -> None:
        """Gives a new engine the adapters that the last one had."""
        started = {one.name: one for one in info.adapters}
        for name in started.keys() - self.adapters.keys():
            self._send_restoring(partial(wire.unload, name=name))
        for name, one in self.adapters.items():
            now = started.get(name)
            if now is not None and one.digest != now.digest and one.source == now.source:
                logger.warning("the files of the adapter %s have changed", name)
            elif now is None or one.digest != now.digest:
                wanted = LoadAdapter(name=name, source=one.source, replaces=True, digest=one.digest)
                self._send_restoring(partial(wire.load, wanted=wanted))

    def _send_restoring(self, message: Callable[[int], bytes]) -> None:
        number = next(self._numbers)
        self._restoring.add(number)
        self._send(message(number))

    def _settle(self, number: int, error: AdapterError | None) -> None:
        if number in self._restoring:
            self._restoring.discard(number)
            if error is not None:
                logger.error("an adapter is lost: %s", error)
            self._list(self._listed)
        future = self._settling.get(number)
        if future is not None and not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _list(self, listed: tuple[AdapterInfo, ...]) -> None:
        """Notes which adapters there are; until all are back, those that there were."""
        self._listed = listed
        if not self._restoring:
            self.adapters = {one.name: one for one in listed}

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
                stream.push(SequenceOutput(request_id=stream.request.request_id, error=reason))


def _pace(request: Request, call: CallRecord | None) -> Pace:
    begun = time.monotonic() if call is None else call.began
    return Pace(begun, len(request.prompt_token_ids), bool(request.grammar), call)
