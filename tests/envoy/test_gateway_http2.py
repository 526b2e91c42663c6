"""What the gateway does with HTTP/2 itself: frames of headers, streams at a time, windows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway
from tests.raw_http2 import RawConnection, raw_connection

JSON = ("content-type", "application/json")
STREAM_WINDOW, CONNECTION_WINDOW = 262144, 1048576  # bytes, of envoy/envoy.yaml.j2
FLOOD_BYTES = 256 << 20
MAX_GROWTH_BYTES = 4 << 20


def port(gateway: Gateway) -> int:
    """The port that Envoy listens on."""
    return int(gateway.target.rpartition(":")[2])


async def status(connection: RawConnection, stream_id: int) -> str:
    """The status of a stream's response, once it has ended."""
    reply = await connection.of(h2.events.ResponseReceived, stream_id)
    await connection.of(h2.events.StreamEnded, stream_id)
    return dict(reply.headers or ())[":status"]


@pytest.mark.parametrize(("piece", "value"), [(1, "y"), (7, "y" * 300), (1000, "y" * 60_000)])
async def test_headers_may_come_in_many_continuations(
    gateway: Gateway, piece: int, value: str
) -> None:
    async with raw_connection(port(gateway)) as connection:
        headers = [JSON, ("x-long", value)]
        stream_id = connection.post_in_pieces("/generate", headers, b"{}", piece=piece)
        assert await status(connection, stream_id) == "200"
        assert gateway.service.calls[-1].metadata["x-long"] == value
        after = connection.post("/generate", [JSON], b"{}")  # both ends agree on the tables
        assert await status(connection, after) == "200"


async def until_the_end(connection: RawConnection) -> None:
    """Reads until the server ends the connection."""
    with contextlib.suppress(EOFError, OSError):
        await connection.of(h2.events.ConnectionTerminated)


@pytest.mark.parametrize(
    "piece",
    [b"", b"\0\1a\1b", b"\0\1a" + b"\x7f\x81\x7d" + b"y" * 16128],
    ids=["empty", "small", "large"],
)
async def test_flood_of_continuations_is_cut(gateway: Gateway, piece: bytes) -> None:
    before = gateway.memory()
    async with raw_connection(port(gateway)) as connection:
        flood = asyncio.create_task(connection.flood("/generate", piece, FLOOD_BYTES))
        async with asyncio.timeout(DEADLINE):
            await until_the_end(connection)
            assert not flood.done() or flood.exception() is not None, "all of it was taken"
            with contextlib.suppress(OSError):
                await flood
    assert gateway.memory() - before < MAX_GROWTH_BYTES
    assert not gateway.service.calls
    assert gateway.client.post("/generate", json={}).status_code == 200


async def test_streams_beyond_the_limit_are_refused(start_gateway: StartGateway) -> None:
    with start_gateway(max_requests=2) as small:
        small.wait_until_healthy()
        gate = small.service.gate()

        async def unary(_request: Any, _context: Any) -> Any:
            await gate.wait()
            return small.messages.reply("Generate", b"{}")

        small.service.behave("Generate", unary)
        async with raw_connection(port(small)) as connection:
            # At once, before the client has read how many it may open.
            first, second, third = (connection.post("/generate", [JSON], b"{}") for _ in range(3))
            refused = await connection.of(h2.events.StreamReset, third)
            assert refused.error_code == ErrorCodes.REFUSED_STREAM
            gate.open()
            assert await status(connection, first) == "200"
            assert await status(connection, second) == "200"
            assert await status(connection, connection.post("/generate", [JSON], b"{}")) == "200"


@pytest.mark.parametrize("max_requests", [3, 500])
async def test_callers_are_told_the_limits(start_gateway: StartGateway, max_requests: int) -> None:
    with start_gateway(max_requests=max_requests) as running:
        running.wait_until_healthy()
        async with raw_connection(port(running)) as connection:
            event = await connection.of(h2.events.RemoteSettingsChanged)
            told = {code: item.new_value for code, item in event.changed_settings.items()}
            assert told[SettingCodes.MAX_CONCURRENT_STREAMS] == max_requests
            assert told[SettingCodes.INITIAL_WINDOW_SIZE] == STREAM_WINDOW
            await connection.of(h2.events.WindowUpdated)
            assert connection.h2.outbound_flow_control_window == CONNECTION_WINDOW
