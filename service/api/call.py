"""One RPC call: its metadata, whether it came over REST or gRPC, and the headers of its reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from grpc import aio

from ..call_record import REQUEST_ID_HEADER, current_record
from ..codec.presenter import Presenter, Reply, RestPresenter, TypedPresenter
from ..error_bodies import FORMAT_HEADER, OPENAI_PATHS, error_format
from ..errors import ErrorKind, ServiceError, slow_reader
from .keep_alive import KeepAlive

# Envoy's transcoder sets it on REST calls; Envoy removes it from gRPC calls.
_ORIGINAL_PATH = "x-envoy-original-path"

# Envoy sets it on all calls, in place of what a caller has sent.
_GATEWAY_ID = "x-tokenwire-call"

MAX_UNREAD_S = 30.0  # that a caller may leave a message of a stream unread

Metadata = Iterable[tuple[str, str | bytes]] | None


def rest_path(metadata: Metadata, *, from_gateway: bool) -> str | None:
    """The path that a REST caller asked for, without its query: only the gateway can say so.

    None if the call was made by a gRPC caller.
    """
    path = dict(metadata or ()).get(_ORIGINAL_PATH) if from_gateway else None
    if path is None:
        return None
    text = path.decode(errors="replace") if isinstance(path, bytes) else path
    return text.partition("?")[0]


class Call:
    """One call, as its handler sees it.

    Args:
        context: the call, as grpc.aio has it.
        from_gateway: whether it arrived at the gateway's address.
        num_bytes: the size of its request.

    Raises:
        ServiceError: its headers ask for what there is not.

    Attributes:
        received: when it arrived, in seconds of the monotonic clock.
        metadata: the caller's metadata, without binary values.
        is_rest: whether Envoy made it from a REST request.
        gateway_id: what no other call has, and this one keeps when Envoy makes it again elsewhere;
            empty if it did not come through Envoy.
        failure: why its stream has ended early, if the caller did not read it.
        has_begun: whether its headers are sent.
        presenter: makes replies in the form that this caller expects.
    """

    def __init__(
        self, context: aio.ServicerContext[Any, Any], *, from_gateway: bool, num_bytes: int = 0
    ) -> None:
        self._context = context
        self.has_begun = False
        self._loop = asyncio.get_running_loop()
        self.num_bytes = num_bytes
        self.received = time.monotonic()
        metadata = context.invocation_metadata() or ()
        self.metadata = {key: value for key, value in metadata if isinstance(value, str)}
        path = rest_path(metadata, from_gateway=from_gateway)
        self.is_rest = path is not None
        self.gateway_id = self.metadata.get(_GATEWAY_ID, "") if from_gateway else ""
        self.failure: ServiceError | None = None
        self._end: Callable[[], Coroutine[Any, Any, object]] | None = None
        self._ending: asyncio.Task[object] | None = None
        self._last_write = 0.0  # when it began, of the event loop's clock
        self._is_writing = False
        self._watch: asyncio.TimerHandle | None = None
        self._keep_alive: KeepAlive | None = None
        self._headers: dict[str, str] | None = None  # that go before the first message
        self.presenter: Presenter = TypedPresenter() if path is None else self._rest_presenter(path)

    def _rest_presenter(self, path: str) -> RestPresenter:
        """Replies for REST callers, with errors in the form that this one reads.

        Raises:
            ServiceError: it asks for a form that there is not.
        """
        wanted = self.metadata.get(FORMAT_HEADER, "tgi")
        if path.startswith(OPENAI_PATHS) and wanted not in ("tgi", "openai"):
            raise ServiceError(
                ErrorKind.VALIDATION,
                f"the header `{FORMAT_HEADER}` must be `tgi` or `openai`. Given: {wanted}",
                field=FORMAT_HEADER,
            )
        return RestPresenter(error_format(path, self.metadata))

    def end_unread_by(self, end: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Sets what ends the work for this call's stream when the caller stops to read it."""
        self._end = end

    async def write(self, reply: Reply) -> None:
        """Sends a message of a stream, which may wait until the caller has read others.

        After `MAX_UNREAD_S` the work for the stream ends, and `failure` says so. The message stays:
        a write that has begun cannot be taken back, and nothing can overtake it.
        """
        self._last_write = self._loop.time()
        self._is_writing = True
        if self._watch is None:  # one timer for many writes, since each costs as much as a token
            self._watch = self._loop.call_later(MAX_UNREAD_S, self._look)
        try:
            if self._keep_alive is not None and self._keep_alive.sending is not None:
                await self._keep_alive.sending
            if self._headers is not None:
                await self._begin(self._headers)
            await self._context.write(reply)
        finally:
            self._is_writing = False
            if self._ending is not None:
                await self._ending

    def keep_alive(self, filler: Reply, interval_s: float) -> None:
        """From now on sends the filler whenever no message was sent for so long."""
        self._last_write = self._loop.time()
        self._keep_alive = KeepAlive(
            lambda: self._fill(filler),
            lambda: None if self._is_writing else self._last_write,
            interval_s,
        )

    async def _fill(self, filler: Reply) -> None:
        self._last_write = self._loop.time()
        if self._headers is not None:
            await self._begin(self._headers)
        await self._context.write(filler)

    async def aclose(self) -> None:
        """Ends what watches the writes of a stream."""
        if self._watch is not None:
            self._watch.cancel()
        if self._keep_alive is not None:
            await self._keep_alive.close()

    def _look(self) -> None:
        """Ends the work for a stream whose write goes on for too long, or looks again."""
        now = self._loop.time()
        since = self._last_write if self._is_writing else now
        if now - since >= MAX_UNREAD_S:
            self._watch = None
            self._give_up()
        else:
            self._watch = self._loop.call_at(since + MAX_UNREAD_S, self._look)

    def _give_up(self) -> None:
        if self._end is not None and self.failure is None:
            self.failure = slow_reader(MAX_UNREAD_S)
            self._ending = asyncio.create_task(self._end())

    async def begin_stream(self, headers: dict[str, str]) -> None:
        """Sends the headers of a stream; over REST only with the first message.

        REST callers do not see them before that, and a call that was not answered with a byte can
        be made again elsewhere if this process ends.
        """
        if self.is_rest:
            self._headers = headers
        else:
            await self.send_headers(headers)

    async def _begin(self, headers: dict[str, str]) -> None:
        self._headers = None
        await self.send_headers(headers)

    async def send_headers(self, headers: dict[str, str]) -> None:
        """Sends response headers (gRPC: initial metadata).

        To be called only before a successful reply: once they are sent, an error cannot have a REST
        status of its own.
        """
        self.has_begun = True
        record = current_record()
        request_id = {} if record is None else {REQUEST_ID_HEADER: record.request_id}
        await self._context.send_initial_metadata(tuple((headers | request_id).items()))
