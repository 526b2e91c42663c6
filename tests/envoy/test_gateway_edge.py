"""What the gateway bears from strangers: limits on headers, time, connections and memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import h2.events
import pytest

from service.launch.edge import MAX_HEADERS, MAX_HEADERS_KB, Edge
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway, poll
from tests.raw_http2 import Headers, raw_connection

JSON = ("content-type", "application/json")
TOO_LARGE = b'{"error":"Request Header Fields Too Large","error_type":"validation"}'
LATE = b'{"error":"Request Timeout","error_type":"timeout"}'
PARSED_KB = Edge().parsed_headers_kb
OVERLOADED = b'{"error":"Model is overloaded","error_type":"overloaded"}'


def port(gateway: Gateway) -> int:
    """The port that Envoy listens on."""
    return int(gateway.target.rpartition(":")[2])


@contextlib.contextmanager
def connect(gateway: Gateway) -> Iterator[socket.socket]:
    """A connection to Envoy."""
    with socket.create_connection(("127.0.0.1", port(gateway)), timeout=DEADLINE) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until Envoy closes the connection."""
    with connection.makefile("rb") as reply:
        return reply.read()


def kilobytes(number: int) -> list[tuple[str, str]]:
    """Headers of about so many KB."""
    return [(f"x-{index:04}", "y" * 1018) for index in range(number)]


async def post_http_2(gateway: Gateway, headers: Headers) -> tuple[str, bytes]:
    """Status and body of a POST over HTTP/2."""
    async with raw_connection(port(gateway)) as connection:
        stream_id = connection.post("/generate", [JSON, *headers], b"{}")
        reply = await connection.of(h2.events.ResponseReceived, stream_id)
        await connection.of(h2.events.StreamEnded, stream_id)
        return dict(reply.headers or ())[":status"], connection.data(stream_id)


@pytest.mark.parametrize("number", [9, 16, 30, 60])
async def test_large_headers_reach_the_service(gateway: Gateway, number: int) -> None:
    headers = kilobytes(number)
    for _ in range(5):  # a limit of gRPC's once refused some of them at random
        assert gateway.client.post("/generate", headers=[JSON, *headers]).status_code == 200
        assert gateway.service.calls[-1].metadata.items() >= dict(headers).items()
    assert (await post_http_2(gateway, headers))[0] == "200"
    assert (await post_http_2(gateway, [("authorization", "y" * 1024 * number)]))[0] == "200"


@pytest.mark.parametrize("number", [MAX_HEADERS_KB, 2 * MAX_HEADERS_KB, 4 * MAX_HEADERS_KB])
async def test_headers_over_the_limit_are_431(gateway: Gateway, number: int) -> None:
    headers = kilobytes(number)
    reply = gateway.client.post("/generate", headers=[JSON, *headers])
    assert (reply.status_code, reply.content) == (431, TOO_LARGE)
    assert reply.headers["content-type"] == "application/json"
    assert await post_http_2(gateway, headers) == ("431", TOO_LARGE)
    assert not gateway.service.calls


async def test_one_header_over_the_limit_is_431(gateway: Gateway) -> None:
    headers = [("cookie", "y" * 1024 * MAX_HEADERS_KB)]
    reply = gateway.client.post("/generate", headers=[JSON, *headers])
    assert (reply.status_code, reply.content) == (431, TOO_LARGE)
    assert await post_http_2(gateway, headers) == ("431", TOO_LARGE)


@pytest.mark.parametrize("number", [MAX_HEADERS, 4 * MAX_HEADERS])
async def test_too_many_headers_are_431(gateway: Gateway, number: int) -> None:
    headers = [(f"x-{index}", "") for index in range(number)]
    assert await post_http_2(gateway, headers) == ("431", TOO_LARGE)
    reply = gateway.client.post("/generate", headers=[JSON, *headers])
    assert (reply.status_code, reply.content) == (431, TOO_LARGE)


def test_headers_that_are_not_even_parsed_are_431(gateway: Gateway) -> None:
    with connect(gateway) as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 1024 * PARSED_KB)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert body == TOO_LARGE


def test_large_metadata_of_grpc_callers_is_passed_on_or_refused_in_words(gateway: Gateway) -> None:
    request = gateway.messages.new("GenerateRequest")
    with gateway.channel() as channel:
        call = gateway.stub(channel, "Generate")
        call(request, metadata=kilobytes(60), timeout=DEADLINE)
        with pytest.raises(grpc.RpcError) as caught:
            call(request, metadata=kilobytes(MAX_HEADERS_KB), timeout=DEADLINE)
    error: Any = caught.value
    assert error.details() == "Request Header Fields Too Large"


def test_large_answering_headers_are_passed_on(gateway: Gateway) -> None:
    async def unary(_request: Any, context: Any) -> Any:
        await context.send_initial_metadata(kilobytes(60))
        return gateway.messages.reply("Generate", b"{}")

    gateway.service.behave("Generate", unary)
    with connect(gateway) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: 2\r\nconnection: close\r\n\r\n{}"
        )
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(head) > 60 * 1024
    assert body == b"{}"


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        ("//info", "/info"),
        ("/docs/../info", "/info"),
        ("/./info", "/info"),
        ("/v1//models", "/v1/models"),
        ("/%69nfo", "/info"),
    ],
)
def test_spellings_of_a_path_are_one(gateway: Gateway, sent: str, path: str) -> None:
    with connect(gateway) as connection:
        connection.sendall(
            b"GET %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" % sent.encode()
        )
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert gateway.service.calls[-1].metadata["x-envoy-original-path"] == path


@pytest.mark.parametrize(
    "path", ["/docs%2finfo", "/v1%5Cmodels", "/v1%2Fmodels/a", "/a%2f..%2finfo"]
)
def test_escaped_slash_does_not_separate(gateway: Gateway, path: str) -> None:
    with connect(gateway) as connection:
        request = b"GET %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" % path.encode()
        connection.sendall(request)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert b'"error_type":"not_found"' in body
    assert not gateway.service.calls


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("tgi", "tgi"),
        ("org/name", "org/name"),
        ("org%2Fname", "org%2Fname"),
        ("a%20b/c.d-e:f@1", "a b/c.d-e:f@1"),
        ("./x", "x"),
    ],
)
def test_name_of_a_model_is_the_rest_of_the_path(gateway: Gateway, sent: str, name: str) -> None:
    with connect(gateway) as connection:
        request = b"GET /v1/models/%s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        connection.sendall(request % sent.encode())
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert gateway.service.calls[-1].method == "GetModel"
    assert gateway.service.calls[-1].request.id == name


def test_half_a_body_is_408(start_gateway: StartGateway) -> None:
    with start_gateway(edge=Edge(request_s=0.5)) as hasty:
        hasty.wait_until_healthy()
        with connect(hasty) as connection:
            connection.sendall(
                b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                b'content-length: 100\r\n\r\n{"inputs":'
            )
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert body == LATE
        assert not [call for call in hasty.service.calls if call.method == "Generate"]


async def test_half_a_grpc_message_is_refused_in_words(start_gateway: StartGateway) -> None:
    with start_gateway(edge=Edge(request_s=0.5)) as hasty:
        hasty.wait_until_healthy()
        async with raw_connection(port(hasty)) as connection:
            path = f"/{hasty.messages.service.full_name}/Generate"
            kind = [("content-type", "application/grpc"), ("te", "trailers")]
            stream_id = connection.post(path, kind, b"\0\0\0", end=False)
            reply = await connection.of(h2.events.ResponseReceived, stream_id)
        headers = dict(reply.headers or ())
        assert headers[":status"] == "200"
        assert headers["grpc-message"] == "Request Timeout"
        assert headers["x-request-id"]


def test_answer_may_take_longer_than_the_request(start_gateway: StartGateway) -> None:
    with start_gateway(edge=Edge(request_s=0.2)) as hasty:
        hasty.wait_until_healthy()
        with connect(hasty) as late:
            gate = hasty.service.gate()

            async def unary(_request: Any, _context: Any) -> Any:
                await gate.wait()
                return hasty.messages.reply("Generate", b"{}")

            hasty.service.behave("Generate", unary)
            late.sendall(
                b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                b"content-length: 2\r\nconnection: close\r\n\r\n{}"
            )
            with connect(hasty) as half:  # it is cut after the whole one would have been
                half.sendall(
                    b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                    b"content-length: 2\r\n\r\n{"
                )
                assert read_all(half).startswith(b"HTTP/1.1 408 ")
            gate.open()
            assert read_all(late).startswith(b"HTTP/1.1 200 ")


def test_idle_connection_is_closed(start_gateway: StartGateway) -> None:
    with start_gateway(edge=Edge(idle_s=0.3)) as brief, connect(brief) as connection:
        connection.sendall(b"GET /nope HTTP/1.1\r\nhost: a\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 404 ")


async def test_an_ended_answer_that_is_not_read_is_reset(start_gateway: StartGateway) -> None:
    """Envoy would hold the rest for ever, of as many as fill its memory."""
    with start_gateway(edge=Edge(unread_s=0.3)) as brief:
        brief.wait_until_healthy()
        brief.service.reply("GenerateStream", b"data: {}\n\n" * 20)
        async with raw_connection(port(brief), window=50) as connection:
            stream_id = connection.post("/generate_stream", [JSON], b"{}")
            await connection.of(h2.events.StreamReset, stream_id)
            assert len(connection.data(stream_id)) == 50
            stream_id = connection.post("/nope", [JSON], b"{}")  # which is short
            await connection.of(h2.events.StreamEnded, stream_id)


def test_peer_that_does_not_answer_pings_is_cut(start_gateway: StartGateway) -> None:
    with start_gateway(edge=Edge(ping_s=0.2)) as brief, connect(brief) as connection:
        empty_settings = b"\0\0\0\4\0\0\0\0\0"
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings)
        assert b"\0\0\x08\6\0\0\0\0\0" in read_all(connection)  # the head of a ping


async def test_old_http_2_connection_ends_after_its_streams(start_gateway: StartGateway) -> None:
    with start_gateway(max_connection_seconds=1) as running:
        running.wait_until_healthy()
        gate = running.service.gate()

        async def stream(_request: Any, _context: Any) -> Any:
            yield running.messages.reply("GenerateStream", b"data: {}\n\n", "text/event-stream")
            await gate.wait()
            yield running.messages.reply("GenerateStream", b"data: {}\n\n", "text/event-stream")

        running.service.behave("GenerateStream", stream)
        async with raw_connection(port(running)) as connection:
            stream_id = connection.post("/generate_stream", [JSON], b"{}")
            ended = await connection.of(h2.events.ConnectionTerminated)
            assert ended.error_code == 0
            assert connection.data(stream_id) == b"data: {}\n\n"
            gate.open()


def test_old_http_1_connection_says_that_it_ends(start_gateway: StartGateway) -> None:
    with (
        start_gateway(max_connection_seconds=1) as running,
        connect(running) as connection,
        connection.makefile("rb") as reply,
    ):

        def is_last() -> bool:
            connection.sendall(b"HEAD /nope HTTP/1.1\r\nhost: a\r\n\r\n")
            head = b"".join(iter(reply.readline, b"\r\n"))
            assert head.startswith(b"HTTP/1.1 404 ")
            return b"\r\nconnection: close\r\n" in head

        poll(is_last, "Envoy ends the connection")
        assert reply.read() == b""


def test_requests_are_refused_when_the_memory_is_used_up(start_gateway: StartGateway) -> None:
    with start_gateway(max_heap_bytes=1) as full:
        full.wait_until_healthy(status=429)
        reply = full.client.post("/generate", json={})
        assert (reply.status_code, reply.content) == (429, OVERLOADED)
        with full.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            request = full.messages.new("GenerateRequest")
            full.stub(channel, "Generate")(request, timeout=DEADLINE)
        error: Any = caught.value
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "Model is overloaded",
        )
