"""A server that is told to end: its streams never look complete when they are not."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import h2.events
import httpx
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running, wait_until
from tests.raw_http2 import RawConnection, raw_connection

LONG = {"inputs": PROMPT, "parameters": ENDLESS}
JSON = [("content-type", "application/json")]
OPENAI = {"temperature": 1e6, "seed": 2, "max_tokens": 1900, "stream": True}
ENDED = "service.access: GenerateStream /generate_stream OK"  # a line of the log
CUT = "Request failed during generation: Server error: the server is shutting down"


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Stack]:
    """It gives running requests next to no time."""
    with running(tmp_path / "log", "--drain-seconds=0.2") as stack:
        yield stack


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Stack]:
    with running(tmp_path / "log") as stack:
        yield stack


def events(lines: Iterator[str]) -> Iterator[Any]:
    """The events of a stream; the end mark as it is."""
    for line in lines:
        text = line.removeprefix("data: ")
        if text and text != line:
            yield text if text == "[DONE]" else json.loads(text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate_stream", LONG),
        ("/", {**LONG, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], **OPENAI}),
        ("/v1/completions", {"prompt": PROMPT, **OPENAI}),
    ],
)
def test_a_stream_that_is_cut_ends_with_an_error(
    impatient: Stack, path: str, body: dict[str, Any]
) -> None:
    with impatient.http.stream("POST", path, json=body) as reply:
        received = events(reply.iter_lines())
        next(received)
        impatient.process.send_signal(signal.SIGTERM)
        *_, last = (event for event in received if event != "[DONE]")
    assert last == {"error": CUT, "error_type": "generation"}


def test_a_grpc_stream_that_is_cut_ends_with_a_status(impatient: Stack) -> None:
    api = ReflectionClient(impatient.through_envoy)
    with pytest.raises(grpc.RpcError) as cut:
        for number, _ in enumerate(api.call("GenerateStream", LONG)):
            if number == 0:
                impatient.process.send_signal(signal.SIGTERM)
    assert cut.value.code() is grpc.StatusCode.ABORTED
    assert cut.value.details() == CUT


def test_connections_are_asked_to_close_while_a_stream_goes_on(patient: Stack) -> None:
    """HTTP/1 by a header of the next reply; the stream itself ends well."""
    with patient.http.stream("POST", "/generate_stream", json=LONG) as reply:
        received = events(reply.iter_lines())
        next(received)
        with httpx.Client(base_url=patient.url, timeout=DEADLINE_S) as other:
            assert "connection" not in other.get("/info").headers
            patient.process.send_signal(signal.SIGTERM)
            closing = other.get("/info")
            while closing.headers.get("connection") != "close":
                closing = other.get("/info")
        *_, last = received
    assert last["generated_text"]


@asynccontextmanager
async def unread_stream(stack: Stack) -> AsyncGenerator[tuple[RawConnection, int]]:
    """A stream of which 1,000 bytes may come, by number, of a server that is told to end."""
    port = int(stack.address.rpartition(":")[2])
    async with asyncio.timeout(DEADLINE_S), raw_connection(port, window=1000) as connection:
        stream_id = connection.post("/generate_stream", JSON, json.dumps(LONG).encode())
        await connection.of(h2.events.DataReceived, stream_id)
        stack.process.send_signal(signal.SIGTERM)
        yield connection, stream_id


async def test_an_http2_connection_is_told_to_go_away(patient: Stack) -> None:
    """With the next reply, while another stream is not read to its end."""
    async with unread_stream(patient) as (connection, _):
        while not any(isinstance(e, h2.events.ConnectionTerminated) for e in connection.events):
            other_id = connection.post("/tokenize", JSON, b'{"inputs": ""}')
            await connection.until(partial(is_end_of, other_id))


async def test_a_stream_that_is_read_slowly_is_whole(patient: Stack) -> None:
    """All of it is with Envoy, and the service has nothing to do any more, when it is read."""
    async with unread_stream(patient) as (connection, stream_id):
        await asyncio.to_thread(wait_until, lambda: ENDED in patient.log(), "the end of the call")
        connection.read_on(stream_id, 1 << 20)
        await connection.of(h2.events.StreamEnded, stream_id)
    *_, last = events(iter(connection.data(stream_id).decode().splitlines()))
    assert last["generated_text"]


def test_a_second_signal_ends_streams_with_an_error(patient: Stack) -> None:
    with patient.http.stream("POST", "/generate_stream", json=LONG) as reply:
        received = events(reply.iter_lines())
        next(received)
        patient.process.send_signal(signal.SIGTERM)
        patient.process.send_signal(signal.SIGINT)  # two of one number may arrive as one
        *_, last = received
    assert last == {"error": CUT, "error_type": "generation"}
    assert patient.process.wait(DEADLINE_S) == 1


def test_operators_see_a_drain_and_end_streams_that_are_long(patient: Stack) -> None:
    api, engine = ReflectionClient(patient.through_envoy), patient.child("engine")
    api.describe()
    with patient.http.stream("POST", "/generate_stream", json=LONG) as reply:
        received = events(reply.iter_lines())
        next(received)
        engine.suspend()  # so that the stream is long
        patient.process.send_signal(signal.SIGTERM)
        while patient.http.get("/health").is_success:
            pass
        assert patient.metric("tokenwire_requests_active") == 1
        assert api.call("Abort", {"request_id": reply.headers["x-request-id"]}).aborted == 1
        *_, last = received
        engine.resume()
    assert last["error_type"] == "cancelled"


def test_a_stream_goes_on_though_the_engine_dies_in_the_drain(patient: Stack) -> None:
    whole = patient.http.post("/generate", json=LONG).json()["generated_text"]
    with patient.http.stream("POST", "/generate_stream", json=LONG) as reply:
        received = events(reply.iter_lines())
        next(received)
        patient.process.send_signal(signal.SIGTERM)
        patient.child("engine").kill()
        *_, last = received
    assert last["generated_text"] == whole


def is_end_of(stream_id: int, event: h2.events.Event) -> bool:
    """Whether a stream has ended, or its connection will."""
    if isinstance(event, h2.events.ConnectionTerminated):
        return True
    return isinstance(event, h2.events.StreamEnded) and event.stream_id == stream_id
