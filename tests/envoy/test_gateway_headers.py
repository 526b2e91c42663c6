"""Headers over REST: internal ones pass in neither direction, and browsers may call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from tests.envoy.gateway import Gateway, StartGateway

COMMON = {"content-type", "date", "server", "access-control-allow-origin"}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type",
}


def test_answer_has_no_internal_header(gateway: Gateway) -> None:
    reply = gateway.client.post("/generate", json={"inputs": "a"})
    assert set(reply.headers) == COMMON | {"content-length"}
    assert reply.headers["server"] == "tokenwire"


def test_stream_has_no_internal_header(gateway: Gateway) -> None:
    gateway.service.reply("Chat", b"data: {}\n\n", content_type="text/event-stream")
    reply = gateway.client.post("/v1/chat/completions", json={})
    assert set(reply.headers) == COMMON | {"transfer-encoding"}


@pytest.mark.parametrize(
    ("path", "method"), [("/generate", "Generate"), ("/generate_stream", "GenerateStream")]
)
def test_error_of_the_service_has_no_internal_header(
    gateway: Gateway, path: str, method: str
) -> None:
    code = grpc.StatusCode.INVALID_ARGUMENT
    secrets: dict[str, str | bytes] = {"internal": "1", "grpc_status_details_bin": b"\x08\x03"}
    for rest in ({"x_http_status": "422", "x_error_body": "{}"}, {}):
        gateway.service.fail(method, code, "a secret", **rest, **secrets)
        reply = gateway.client.post(path, json={"inputs": "a"})
        assert set(reply.headers) == COMMON | {"content-length"}


@pytest.mark.parametrize("path", ["/nope", "/generate"])
def test_error_of_envoy_has_no_internal_header(gateway: Gateway, path: str) -> None:
    reply = gateway.client.get(path)
    assert set(reply.headers) - {"allow"} == COMMON | {"content-length"}


def test_initial_metadata_becomes_headers(gateway: Gateway) -> None:
    metadata = (
        ("x-compute-type", "cpu"),
        ("x-accel-buffering", "no"),
        ("cache-control", "no-cache"),
    )

    async def stream(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata(metadata)
        yield gateway.messages.reply("GenerateStream", b"data: {}\n\n", "text/event-stream")

    async def unary(_request: Any, context: Any) -> Any:
        await context.send_initial_metadata(metadata)
        return gateway.messages.reply("Generate", b"{}")

    gateway.service.behave("GenerateStream", stream)
    gateway.service.behave("Generate", unary)
    for path in ("/generate", "/generate_stream"):
        headers = gateway.client.post(path, json={}).headers
        assert {name: headers[name] for name, _ in metadata} == dict(metadata)


def test_ids_of_the_client_reach_the_service(gateway: Gateway) -> None:
    sent = {
        "x-request-id": "mine",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "authorization": "Bearer key",
    }
    gateway.client.post("/generate", json={}, headers=sent)
    metadata = gateway.service.calls[-1].metadata
    assert {name: metadata[name] for name in sent} == sent


def test_request_without_id_gets_one(gateway: Gateway) -> None:
    gateway.client.post("/generate", json={})
    assert gateway.service.calls[-1].metadata["x-request-id"]


def test_forged_internal_headers_do_not_reach_the_service(gateway: Gateway) -> None:
    forged = {"x-envoy-original-path": "/forged", "x-envoy-retry-on": "5xx"}
    gateway.client.post("/generate", json={}, headers=forged)
    metadata = gateway.service.calls[-1].metadata
    assert metadata["x-envoy-original-path"] == "/generate"
    assert "x-envoy-retry-on" not in metadata


@pytest.mark.parametrize("path", ["/", "/generate", "/v1/chat/completions", "/info", "/nope"])
def test_preflight_is_answered_for_every_path(gateway: Gateway, path: str) -> None:
    reply = gateway.client.options(path, headers={"origin": "https://a.example", **PREFLIGHT})
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["access-control-allow-methods"] == "GET,POST"
    allowed = reply.headers["access-control-allow-headers"].split(",")
    assert {"content-type", "authorization", "x-request-id", "x-grpc-web"} <= set(allowed)
    assert not gateway.service.calls


def test_page_of_any_origin_can_read_answers_and_errors(gateway: Gateway) -> None:
    origin = {"origin": "https://a.example"}
    gateway.service.fail("Tokenize", grpc.StatusCode.INTERNAL, "")
    replies = [
        gateway.client.post("/generate", json={}, headers=origin),
        gateway.client.post("/tokenize", json={}, headers=origin),
        gateway.client.post("/generate", content=b"{", headers=origin),
        gateway.client.get("/nope", headers=origin),
        gateway.client.put("/info", headers=origin),
    ]
    assert [reply.status_code for reply in replies] == [200, 500, 415, 404, 405]
    assert {reply.headers["access-control-allow-origin"] for reply in replies} == {"*"}


@pytest.fixture(scope="module")
def strict_gateway(start_gateway: StartGateway) -> Iterator[Gateway]:
    """A gateway that allows two origins."""
    with start_gateway(cors_allow_origins=("https://a.example", "http://b.example:81")) as running:
        running.wait_until_healthy()
        yield running


@pytest.mark.parametrize("verb", ["GET", "OPTIONS", "PUT"])
def test_listed_origin_is_allowed_by_name(strict_gateway: Gateway, verb: str) -> None:
    for origin in ("https://a.example", "http://b.example:81"):
        headers = {"origin": origin} | (PREFLIGHT if verb == "OPTIONS" else {})
        reply = strict_gateway.client.request(verb, "/info", headers=headers)
        assert reply.headers["access-control-allow-origin"] == origin
        assert reply.headers["vary"] == "origin"


@pytest.mark.parametrize("verb", ["GET", "OPTIONS", "PUT"])
def test_other_origin_is_not_allowed(strict_gateway: Gateway, verb: str) -> None:
    for headers in ({"origin": "https://evil.example"}, {}):
        headers |= PREFLIGHT if verb == "OPTIONS" else {}
        reply = strict_gateway.client.request(verb, "/info", headers=headers)
        assert "access-control-allow-origin" not in reply.headers
