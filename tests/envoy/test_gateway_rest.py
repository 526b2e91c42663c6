"""REST through the gateway: every route, whole and streamed bodies, and cancellation."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.routes import REST_ROUTES
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway

JSON = {"content-type": "application/json"}
ROUTES = [
    ("GET", "/", "Health"),
    ("GET", "/health", "Health"),
    ("GET", "/info", "Info"),
    ("GET", "/metrics", "Metrics"),
    ("POST", "/", "CompatGenerate"),
    ("POST", "/generate", "Generate"),
    ("POST", "/generate_stream", "GenerateStream"),
    ("POST", "/v1/chat/completions", "Chat"),
    ("POST", "/v1/completions", "Completions"),
    ("POST", "/v1/responses", "Responses"),
    ("POST", "/tokenize", "TokenizeStream"),
]
STREAMED = [
    ("/", "CompatGenerate"),
    ("/generate_stream", "GenerateStream"),
    ("/v1/chat/completions", "Chat"),
    ("/v1/completions", "Completions"),
    ("/v1/responses", "Responses"),
]


@pytest.mark.parametrize(("verb", "path", "method"), ROUTES)
def test_route_reaches_its_method(gateway: Gateway, verb: str, path: str, method: str) -> None:
    content = b"{}" if verb == "POST" else None
    reply = gateway.client.request(verb, path, content=content, headers=JSON)
    assert reply.status_code == 200
    assert reply.content == b'{"method":"%s"}' % method.encode()
    call = gateway.service.calls[-1]
    assert call.method == method
    assert call.metadata["x-envoy-original-path"] == path


def test_query_is_ignored_when_it_names_no_field(gateway: Gateway) -> None:
    reply = gateway.client.post("/generate?verbose=1", json={"inputs": "a"})
    assert reply.content == b'{"method":"Generate"}'


def test_http_1_0_is_served(gateway: Gateway) -> None:
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(b"GET /info HTTP/1.0\r\n\r\n")
        with connection.makefile("rb") as reply:
            assert reply.read().endswith(b'\r\n\r\n{"method":"Info"}')


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/json;charset=UTF-8",
        "application/problem+json",
    ],
)
def test_json_content_types_are_accepted(gateway: Gateway, content_type: str) -> None:
    headers = {"content-type": content_type}
    reply = gateway.client.post("/generate", content=b"{}", headers=headers)
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"",
        b"{'inputs': 'a',}",
        b'{"inputs": "caf\xc3\xa9 \xf0\x9f\x98\x80", "seed": 18446744073709551615, "x": null}',
        b'{"inputs": "\xff\x00"}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("path", [path for path, verbs in REST_ROUTES.items() if "POST" in verbs])
def test_a_body_reaches_the_service_byte_for_byte(gateway: Gateway, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    gateway.client.post(path, content=body, headers=headers)
    request = gateway.service.calls[-1].request
    assert request.http.data == body
    assert [field.name for field, _ in request.ListFields()] in (["http"], [])


def test_a_query_does_not_change_the_body(gateway: Gateway) -> None:
    path = "/generate?inputs=x&parameters.top_k=5&http.data=eHg="
    gateway.client.post(path, content=b"{}", headers={"content-type": "application/json"})
    assert gateway.service.calls[-1].request.http.data == b"{}"


@pytest.mark.parametrize(
    ("bodies", "content_type"),
    [
        pytest.param(
            [b'[{"generated_text":"\\u003c <b> \xc3\xa9 1.0"}]'], "application/json", id="array"
        ),
        pytest.param(
            [b'{"id":"","object":"text_completion","x":1.0,"y":null}'],
            "application/json",
            id="object",
        ),
        pytest.param(
            [b'data: {"a":"<b>"}\n\n', b":\n\n", b"data: [DONE]\n\n"],
            "text/event-stream",
            id="events",
        ),
    ],
)
@pytest.mark.parametrize(("path", "method"), STREAMED)
def test_path_returns_any_body_of_the_service(
    gateway: Gateway, path: str, method: str, bodies: list[bytes], content_type: str
) -> None:
    gateway.service.reply(method, *bodies, content_type=content_type)
    reply = gateway.client.post(path, json={"inputs": "a", "stream": len(bodies) > 1})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == content_type
    assert reply.content == b"".join(bodies)


def test_plain_text_is_passed_on_unchanged(gateway: Gateway) -> None:
    kind = "text/plain; version=0.0.4; charset=utf-8"
    gateway.service.reply("Metrics", b"# HELP a b\na 1.0\n", content_type=kind)
    reply = gateway.client.get("/metrics")
    assert (reply.content, reply.headers["content-type"]) == (b"# HELP a b\na 1.0\n", kind)


def test_empty_body_is_passed_on_as_empty(gateway: Gateway) -> None:
    gateway.service.reply("Health", b"", content_type="text/plain; charset=utf-8")
    reply = gateway.client.get("/health")
    assert (reply.status_code, reply.content) == (200, b"")


def test_each_event_arrives_before_the_next_is_made(gateway: Gateway) -> None:
    events = [b'data: {"index":%d}\n\n' % index for index in range(3)]
    gates = [gateway.service.gate() for _ in events]

    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for event, gate in zip(events, gates, strict=True):
            yield gateway.messages.reply("GenerateStream", event, "text/event-stream")
            await gate.wait()

    gateway.service.behave("GenerateStream", stream)
    with gateway.client.stream("POST", "/generate_stream", json={"inputs": "a"}) as reply:
        arrived = reply.iter_raw()
        for event, gate in zip(events, gates, strict=True):
            assert next(arrived) == event
            gate.open()
        assert next(arrived, None) is None


def test_large_response_is_passed_on(gateway: Gateway) -> None:
    body = json.dumps({"generated_text": "x" * 8_000_000}).encode()
    gateway.service.reply("Generate", body)
    assert gateway.client.post("/generate", json={"inputs": "a"}).content == body


def test_leaving_a_stream_cancels_the_handler(gateway: Gateway) -> None:
    cancelled = threading.Event()
    gate = gateway.service.gate()

    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield gateway.messages.reply("GenerateStream", b"data: {}\n\n", "text/event-stream")
        try:
            await gate.wait()
        finally:
            cancelled.set()

    gateway.service.behave("GenerateStream", stream)
    with gateway.client.stream("POST", "/generate_stream", json={"inputs": "a"}) as reply:
        arrived = reply.iter_raw()  # held, since dropping it would close the response
        assert next(arrived) == b"data: {}\n\n"
        assert not cancelled.is_set()
    assert cancelled.wait(DEADLINE)


def test_leaving_before_the_answer_cancels_the_handler(gateway: Gateway) -> None:
    started, cancelled = threading.Event(), threading.Event()
    gate = gateway.service.gate()

    async def unary(_request: Any, _context: Any) -> Any:
        started.set()
        try:
            await gate.wait()
        finally:
            cancelled.set()

    gateway.service.behave("Generate", unary)
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: 2\r\n\r\n{}"
        )
        assert started.wait(DEADLINE)
    assert cancelled.wait(DEADLINE)
