"""HEAD: the status and the headers of GET, without its body."""

from __future__ import annotations

import socket

import grpc
import h2.events
import httpx
import pytest

from service.routes import REST_ROUTES
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway
from tests.raw_http2 import raw_connection

READ = [path for path, verbs in REST_ROUTES.items() if "GET" in verbs]
UNCOMPARED = {"date", "x-request-id"}


def compared(reply: httpx.Response) -> dict[str, str]:
    """The headers that do not differ between two equal requests."""
    return {name: value for name, value in reply.headers.items() if name not in UNCOMPARED}


@pytest.mark.parametrize("path", READ)
def test_head_has_the_headers_of_get(gateway: Gateway, path: str) -> None:
    get, head = gateway.client.get(path), gateway.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert compared(head) == compared(get)
    assert head.headers["content-length"] == str(len(get.content))


def test_head_of_an_error_has_its_status(gateway: Gateway) -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    gateway.service.fail("Health", unavailable, "", x_http_status="503", x_error_body="{}")
    get, head = gateway.client.get("/health"), gateway.client.head("/health")
    assert (head.status_code, head.content) == (503, b"")
    assert compared(head) == compared(get)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_head_where_there_is_no_get_is_405(gateway: Gateway, path: str) -> None:
    reply = gateway.client.head(path)
    assert (reply.status_code, reply.content, reply.headers["allow"]) == (405, b"", "POST")


def test_no_byte_follows_the_headers_over_http_1(gateway: Gateway) -> None:
    gateway.service.reply("Info", b"x" * 300_000)
    request = b"HEAD /info HTTP/1.1\r\nhost: a\r\n"
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(request + b"\r\n" + request + b"connection: close\r\n\r\n")
        with connection.makefile("rb") as replies:
            first, second, rest = replies.read().split(b"\r\n\r\n")
    for reply in (first, second):
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\ncontent-length: 300000" in reply
    assert rest == b""


async def test_no_byte_follows_the_headers_over_http_2(gateway: Gateway) -> None:
    gateway.service.reply("Info", b"x" * 300_000)
    async with raw_connection(int(gateway.target.rpartition(":")[2])) as connection:
        stream_id = connection.h2.get_next_available_stream_id()
        names = {":method": "HEAD", ":path": "/info", ":scheme": "http", ":authority": "x"}
        connection.h2.send_headers(stream_id, list(names.items()), end_stream=True)
        connection.send()
        reply = await connection.of(h2.events.ResponseReceived, stream_id)
        await connection.of(h2.events.StreamEnded, stream_id)
        assert dict(reply.headers or ())["content-length"] == "300000"
        assert connection.data(stream_id) == b""
