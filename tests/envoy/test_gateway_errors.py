"""Errors over REST: exact status and bytes, from Envoy and from the service."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from service.errors import ErrorKind
from service.launch.gateway import SERVICE_STATUSES
from service.routes import REST_ROUTES
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway

JSON = {"content-type": "application/json"}
ALLOWED = {"GET": ["GET", "HEAD"], "POST": ["POST"]}
UNHEALTHY = b'{"error":"unhealthy","error_type":"healthcheck"}'
OVERLOADED = b'{"error":"Model is overloaded","error_type":"overloaded"}'
TOO_LARGE = (
    b'{"error":"Failed to buffer the request body: length limit exceeded",'
    b'"error_type":"validation"}'
)
FAILING = [
    ("/generate", "Generate"),
    ("/generate_stream", "GenerateStream"),
    ("/", "CompatGenerate"),
    ("/v1/chat/completions", "Chat"),
    ("/v1/completions", "Completions"),
    ("/v1/responses", "Responses"),
    ("/tokenize", "TokenizeStream"),
]


@pytest.mark.parametrize("path", ["/nope", "/generate/", "/v1", "/GENERATE"])
@pytest.mark.parametrize("verb", ["GET", "POST", "DELETE"])
def test_unknown_path_is_404(gateway: Gateway, verb: str, path: str) -> None:
    reply = gateway.client.request(verb, f"http://{gateway.target}{path}", headers=JSON)
    assert reply.status_code == 404
    assert reply.content == b'{"error":"Not Found","error_type":"not_found"}'
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", REST_ROUTES)
def test_wrong_method_is_405_and_lists_the_allowed_ones(gateway: Gateway, path: str) -> None:
    allowed = [verb for bound in REST_ROUTES[path] for verb in ALLOWED[bound]]
    for verb in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - {*allowed}:
        reply = gateway.client.request(verb, path, headers=JSON)
        assert reply.status_code == 405, verb
        assert reply.headers["allow"] == ",".join(allowed)
        assert reply.headers["content-type"] == "application/json"
        assert reply.content == b'{"error":"Method Not Allowed","error_type":"method_not_allowed"}'
    assert not gateway.service.calls


def test_broken_http_is_answered_in_json(gateway: Gateway) -> None:
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\n\r\n")
        with connection.makefile("rb") as reply:
            head, _, body = reply.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body) == {"error": "missing_host_header", "error_type": "gateway"}


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonl", "text/json"],
)
@pytest.mark.parametrize("path", [path for path, verbs in REST_ROUTES.items() if "POST" in verbs])
def test_other_content_type_is_415(gateway: Gateway, path: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    reply = gateway.client.post(path, content=b"{}", headers=headers)
    assert reply.status_code == 415
    assert reply.headers["content-type"] == "application/json"
    assert reply.content == (
        b'{"error":"Expected request with `Content-Type: application/json`",'
        b'"error_type":"validation"}'
    )
    assert not gateway.service.calls


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_413(gateway: Gateway, chunked: bool) -> None:
    limit = 2_097_152
    body = b'{"inputs":"%s"}' % (b"x" * limit)

    def chunks() -> Iterator[bytes]:
        yield from (body[start : start + 65536] for start in range(0, len(body), 65536))

    reply = gateway.client.post("/tokenize", content=chunks() if chunked else body, headers=JSON)
    assert reply.status_code == 413
    assert reply.headers["content-type"] == "application/json"
    assert reply.content == TOO_LARGE
    assert not gateway.service.calls


def test_body_of_exactly_the_limit_is_accepted(gateway: Gateway) -> None:
    body = b'{"inputs":"%s"}' % (b"x" * (2_097_152 - 13))
    assert len(body) == 2_097_152
    assert gateway.client.post("/tokenize", content=body, headers=JSON).status_code == 200
    assert gateway.service.calls[-1].request.http.data == body


@pytest.mark.parametrize(("path", "method"), FAILING)
def test_service_error_keeps_status_and_bytes(gateway: Gateway, path: str, method: str) -> None:
    text = 'a % b %RESP(X)% "q" \\ <tag> \u00e9 \U0001f600'
    body = json.dumps({"error": text, "error_type": "validation"}, separators=(",", ":"))
    for status in SERVICE_STATUSES:
        gateway.service.fail(
            method,
            grpc.StatusCode.INVALID_ARGUMENT,
            "for gRPC callers: \u00e9",
            x_http_status=str(status),
            x_error_body=body,
        )
        reply = gateway.client.post(path, json={"inputs": "a"})
        assert reply.status_code == status
        assert reply.content == body.encode()
        assert reply.headers["content-type"] == "application/json"


def test_each_status_of_an_error_is_known_to_envoy() -> None:
    inside_of_streams = {ErrorKind.SLOW_READER.http_status}
    assert {kind.http_status for kind in ErrorKind} - inside_of_streams <= set(SERVICE_STATUSES)


def test_service_error_of_a_get_keeps_status_and_bytes(gateway: Gateway) -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    body = UNHEALTHY.decode()
    for path, method in [("/health", "Health"), ("/", "Health"), ("/info", "Info")]:
        gateway.service.fail(method, unavailable, "", x_http_status="503", x_error_body=body)
        reply = gateway.client.get(path)
        assert (reply.status_code, reply.content) == (503, UNHEALTHY)


def test_long_service_error_is_passed_on(gateway: Gateway) -> None:
    body = json.dumps({"error": "x" * 4000, "error_type": "validation"})
    code = grpc.StatusCode.INVALID_ARGUMENT
    gateway.service.fail("Chat", code, "", x_http_status="422", x_error_body=body)
    assert gateway.client.post("/v1/chat/completions", json={}).content == body.encode()


@pytest.mark.parametrize("status", ["429", "503"])
def test_retry_after_reaches_the_client(gateway: Gateway, status: str) -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    gateway.service.fail(
        "Generate", code, "", x_http_status=status, x_error_body="{}", retry_after="3"
    )
    reply = gateway.client.post("/generate", json={})
    assert (reply.status_code, reply.headers["retry-after"]) == (int(status), "3")
    gateway.service.fail("Generate", code, "", x_http_status=status, x_error_body="{}")
    assert "retry-after" not in gateway.client.post("/generate", json={}).headers


@pytest.mark.parametrize(
    ("code", "status", "body"),
    [
        (grpc.StatusCode.UNAVAILABLE, 503, UNHEALTHY),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,  # of gRPC itself: an overload has REST metadata
            500,
            b'{"error":"Internal server error","error_type":"internal"}',
        ),
        (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            504,
            b'{"error":"Request timed out","error_type":"timeout"}',
        ),
        (
            grpc.StatusCode.UNKNOWN,
            500,
            b'{"error":"Internal server error","error_type":"internal"}',
        ),
    ],
)
@pytest.mark.parametrize(("path", "method"), FAILING[:2])
def test_error_without_rest_metadata_is_json_too(
    gateway: Gateway,
    path: str,
    method: str,
    code: grpc.StatusCode,
    status: int,
    body: bytes,
) -> None:
    gateway.service.fail(method, code, "a secret of the server")
    reply = gateway.client.post(path, json={"inputs": "a"})
    assert (reply.status_code, reply.content) == (status, body)
    assert reply.headers["content-type"] == "application/json"


def test_silent_service_is_504_for_get_requests(gateway: Gateway) -> None:
    gate = gateway.service.gate()

    async def unary(_request: Any, _context: Any) -> Any:
        await gate.wait()

    gateway.service.behave("Info", unary)
    reply = gateway.client.get("/info")
    assert reply.status_code == 504
    assert reply.content == b'{"error":"Request timed out","error_type":"timeout"}'


def test_more_than_max_requests_is_429(start_gateway: StartGateway) -> None:
    with start_gateway(max_requests=1) as crowded:
        crowded.wait_until_healthy()
        gate = crowded.service.gate()

        async def stream(_request: Any, _context: Any) -> Any:
            yield crowded.messages.reply("GenerateStream", b"data: {}\n\n", "text/event-stream")
            await gate.wait()

        crowded.service.behave("GenerateStream", stream)
        with crowded.client.stream("POST", "/generate_stream", json={}) as first:
            assert first.status_code == 200
            second = crowded.client.post("/generate", json={})
            gate.open()
        assert (second.status_code, second.content) == (429, OVERLOADED)
        assert second.headers["content-type"] == "application/json"


def test_unreachable_service_is_503(start_gateway: StartGateway) -> None:
    with socket.socket() as reserved:  # bound but not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        with start_gateway(upstream_port=reserved.getsockname()[1]) as orphan:
            for reply in [
                orphan.client.get("/health"),
                orphan.client.get("/"),
                orphan.client.post("/generate", json={"inputs": "a"}),
                orphan.client.post("/v1/chat/completions", json={}),
            ]:
                assert (reply.status_code, reply.content) == (503, UNHEALTHY)
                assert reply.headers["content-type"] == "application/json"
            assert orphan.client.get("/nope").status_code == 404


def test_service_is_503_while_its_health_is_not_serving(start_gateway: StartGateway) -> None:
    with start_gateway() as running:
        running.wait_until_healthy()
        running.service.set_serving(False)
        running.wait_until_healthy(status=503)
        assert running.client.get("/health").content == UNHEALTHY
        running.service.set_serving(True)
        running.wait_until_healthy()


def test_smaller_body_limit_is_obeyed(start_gateway: StartGateway) -> None:
    with start_gateway(max_request_bytes=100) as narrow:
        narrow.wait_until_healthy()
        reply = narrow.client.post("/generate", json={"inputs": "x" * 100})
        assert (reply.status_code, reply.content) == (413, TOO_LARGE)
        assert narrow.client.post("/generate", json={"inputs": "x"}).status_code == 200
