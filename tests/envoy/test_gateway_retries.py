"""A call of which its caller has seen nothing is made again; others fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from service.routes import SERVICE
from tests.envoy.gateway import StartGateway

ANSWER = b"\x08\x01"  # a HealthCheckResponse that says SERVING, and a message of any other type
Headers = list[tuple[str, str]]
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
HEADS_OF_WHOLE_REPLIES = [
    [*HEAD, ("x-total-time", "0.1")],
    [*HEAD, ("x-accel-buffering", "yes")],  # a list of tokens
]
LONG = 3 << 20  # bytes: more than Envoy buffers of a connection
MESSAGE = len(ANSWER).to_bytes(5, "big") + ANSWER


class DyingService:
    """Ends the connection of some calls instead of answering them; health checks are well.

    Args:
        num_deaths: how many calls it dies of.
        begins: what it sends of an answer before: headers, and some bytes.
    """

    def __init__(self, num_deaths: int, begins: tuple[Headers, bytes] | None = None) -> None:
        self.num_calls = 0
        self.ids: list[bytes] = []  # by which Envoy tells a call that it makes again
        self._num_deaths = num_deaths
        self._begins = begins
        self.left = b""  # of these bytes, which go as Envoy has room for them

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        calls: set[int] = set()
        dying: int | None = None  # the stream that it dies of
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        if dict(event.headers)[b":path"].startswith(f"/{SERVICE}/".encode()):
                            calls.add(event.stream_id)
                            self.ids.append(dict(event.headers)[b"x-tokenwire-call"])
                    elif isinstance(event, h2.events.DataReceived):
                        size = event.flow_controlled_length
                        connection.acknowledge_received_data(size, event.stream_id)
                    elif isinstance(event, h2.events.StreamEnded):
                        if event.stream_id in calls and self._dies(connection, event.stream_id):
                            dying = event.stream_id
                        else:
                            _answer(connection, event.stream_id)
                is_over = dying is not None and self._has_begun(connection, dying)
                writer.write(connection.data_to_send())
                if is_over:
                    break
        writer.close()

    def _dies(self, connection: h2.connection.H2Connection, stream_id: int) -> bool:
        self.num_calls += 1
        if self.num_calls > self._num_deaths:
            return False
        if self._begins is not None:
            headers, self.left = self._begins
            connection.send_headers(stream_id, headers)
        return True

    def _has_begun(self, connection: h2.connection.H2Connection, stream_id: int) -> bool:
        """Sends of an answer what there is room for; whether that was all before its death."""
        while room := connection.local_flow_control_window(stream_id):
            part = self.left[: min(room, connection.max_outbound_frame_size)]
            if not part:
                break
            connection.send_data(stream_id, part)
            self.left = self.left[len(part) :]
        return not self.left


def _answer(connection: h2.connection.H2Connection, stream_id: int) -> None:
    connection.send_headers(stream_id, HEAD)
    connection.send_data(stream_id, MESSAGE)
    connection.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)


@contextlib.asynccontextmanager
async def calls_of(service: DyingService, start: StartGateway) -> AsyncIterator[grpc.Channel]:
    """A channel to an Envoy in front of a service."""
    async with await asyncio.start_server(service.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with contextlib.ExitStack() as stack:
            gateway = await asyncio.to_thread(stack.enter_context, start(upstream_port=port))
            yield stack.enter_context(gateway.channel())
            server.close()


async def generate(
    channel: grpc.Channel, request: bytes = b"", metadata: tuple[tuple[str, str], ...] = ()
) -> bytes:
    call = channel.unary_unary(f"/{SERVICE}/Generate")
    return bytes(
        await asyncio.to_thread(call, request, timeout=60, metadata=metadata, wait_for_ready=False)
    )


@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "large"])
async def test_call_of_a_service_that_dies_is_answered_by_the_next(
    start_gateway: StartGateway, size: int
) -> None:
    service = DyingService(num_deaths=1)
    async with calls_of(service, start_gateway) as channel:
        assert await generate(channel, b"x" * size) == ANSWER
    assert service.num_calls == 2


async def test_call_that_is_made_again_keeps_an_id_that_no_other_call_has(
    start_gateway: StartGateway,
) -> None:
    service = DyingService(num_deaths=1)
    async with calls_of(service, start_gateway) as channel:
        for _ in range(2):
            await generate(channel, metadata=(("x-tokenwire-call", "forged"),))
    first, again, other = service.ids
    assert first == again
    assert len({first, other, b"forged"}) == 3


async def test_stream_that_has_not_begun_is_made_again(start_gateway: StartGateway) -> None:
    service = DyingService(num_deaths=1)
    async with calls_of(service, start_gateway) as channel:
        stream = channel.unary_stream(f"/{SERVICE}/GenerateStream")(b"", timeout=60)
        assert await asyncio.to_thread(list, stream) == [ANSWER]
    assert service.num_calls == 2


@pytest.mark.parametrize("head", HEADS_OF_WHOLE_REPLIES, ids=["figures", "list"])
@pytest.mark.parametrize("size", [0, 3, len(MESSAGE)], ids=["headers", "part", "message"])
async def test_whole_reply_of_which_a_part_has_come_is_asked_for_again(
    start_gateway: StartGateway, size: int, head: Headers
) -> None:
    """Headers and message are two writes, and a process may die between them."""
    service = DyingService(1, begins=(head, MESSAGE[:size]))
    async with calls_of(service, start_gateway) as channel:
        assert await generate(channel) == ANSWER
    assert service.num_calls == 2


async def test_long_list_of_which_most_has_come_is_asked_for_again(
    start_gateway: StartGateway,
) -> None:
    part = (LONG + 1).to_bytes(5, "big") + LONG * b"x"
    service = DyingService(1, begins=(HEADS_OF_WHOLE_REPLIES[1], part))
    async with calls_of(service, start_gateway) as channel:
        stream = channel.unary_stream(f"/{SERVICE}/TokenizeStream")(b"", timeout=60)
        assert await asyncio.to_thread(list, stream) == [ANSWER]
    assert service.num_calls == 2
    assert not service.left


async def test_stream_that_has_begun_is_not_made_again(start_gateway: StartGateway) -> None:
    service = DyingService(1, begins=(HEAD, MESSAGE))
    async with calls_of(service, start_gateway) as channel:
        stream = channel.unary_stream(f"/{SERVICE}/GenerateStream")(b"", timeout=60)
        messages = []
        with pytest.raises(grpc.RpcError):
            await asyncio.to_thread(messages.extend, stream)
    assert messages == [ANSWER]
    assert service.num_calls == 1


async def test_call_that_kills_every_service_is_given_up(start_gateway: StartGateway) -> None:
    service = DyingService(num_deaths=100)
    async with calls_of(service, start_gateway) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await generate(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert service.num_calls == 4  # fewer than the deaths after which a supervisor gives up


@pytest.mark.parametrize(
    ("text", "num_calls"),
    [pytest.param("CANCELLED", 2, id="by-grpc"), pytest.param("ended by Abort", 1, id="by-its-id")],
)
def test_call_that_comes_while_a_service_begins_to_end_is_made_again(
    start_gateway: StartGateway, text: str, num_calls: int
) -> None:
    """By gRPC, which cancels calls of whoever has not read yet that it takes no more."""
    with start_gateway() as gateway:
        gateway.wait_until_healthy()
        reply, made = gateway.messages.reply("Generate", b"{}"), []

        async def cancelled_first(request: Any, context: Any) -> Any:
            made.append(request)
            if len(made) == 1:
                await context.abort(grpc.StatusCode.CANCELLED, text)
            return reply

        gateway.service.behave("Generate", cancelled_first)
        status = gateway.client.post("/generate", json={}).status_code
    assert (status, len(made)) == (200 if num_calls == 2 else 500, num_calls)
