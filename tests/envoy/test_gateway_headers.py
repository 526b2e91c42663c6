"""Headers over REST: internal ones pass in neither direction, and browsers may call."""

from __future__ import annotations

import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway

JSON = {"content-type": "application/json"}
COMMON = {"content-type", "date", "server", "access-control-allow-origin", "x-request-id"}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type",
}


@pytest.mark.parametrize("name", ["x-envoy-external-address", "x-forwarded-for"])
def test_service_learns_the_callers_address_whatever_it_says(gateway: Gateway, name: str) -> None:
    gateway.client.get("/info", headers={name: "192.0.2.9"})
    with gateway.channel() as channel:
        gateway.stub(channel, "Info")(
            gateway.messages.new("InfoRequest"), metadata=((name, "192.0.2.9"),), timeout=DEADLINE
        )
    calls = [call for call in gateway.service.calls if call.method == "Info"]
    assert [call.metadata["x-envoy-external-address"] for call in calls] == ["127.0.0.1"] * 2


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


@pytest.mark.parametrize("verb", ["GET", "POST", "HEAD", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", ["/info", "/generate", "/nope"])
def test_every_reply_has_the_id_of_the_caller(gateway: Gateway, verb: str, path: str) -> None:
    headers = {"content-type": "application/json", "x-request-id": "mine"}
    assert gateway.client.request(verb, path, headers=headers).headers["x-request-id"] == "mine"


def test_errors_of_the_service_have_the_id_of_the_caller(gateway: Gateway) -> None:
    for rest in ({"x_http_status": "422", "x_error_body": "{}"}, {}):
        gateway.service.fail("Generate", grpc.StatusCode.INVALID_ARGUMENT, "", **rest)
        reply = gateway.client.post("/generate", json={}, headers={"x-request-id": "mine"})
        assert reply.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("given", [None, "", "a b", "caf\u00e9".encode(), "x" * 129])
def test_request_without_a_usable_id_gets_one(gateway: Gateway, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    reply = gateway.client.post("/generate", json={}, headers=headers)
    made = gateway.service.calls[-1].metadata["x-request-id"]
    assert reply.headers["x-request-id"] == str(uuid.UUID(made))


def test_id_is_not_changed(gateway: Gateway) -> None:
    for given in ("x" * 128, "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "!~"):
        headers = {"x-request-id": given, "x-valid-request-id": "forged"}
        reply = gateway.client.post("/generate", json={}, headers=headers)
        metadata = gateway.service.calls[-1].metadata
        assert reply.headers["x-request-id"] == metadata["x-request-id"] == given
        assert "x-valid-request-id" not in metadata


def test_broken_http_gets_an_id_too(gateway: Gateway) -> None:
    host, _, port = gateway.target.partition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        with connection.makefile("rb") as reply:
            assert b"\r\nx-request-id: " in reply.read()


@pytest.mark.parametrize(
    "headers",
    [
        {"grpc-timeout": "abc"},
        {"grpc-timeout": "1n"},
        {"grpc-encoding": "gzip"},
        {"grpc-encoding": "nonsense"},
        {"grpc-accept-encoding": "nonsense"},
        {"grpc-internal-encoding-request": "gzip"},
        {"grpc-tags-bin": "!"},
        {"x-mine-bin": "not base64!"},
        {"x!y": "1"},
        {"!": "1"},
        {"x_y": "1"},
    ],
)
def test_headers_with_a_meaning_for_grpc_only_are_ignored_over_rest(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    for verb, path in (("POST", "/generate"), ("GET", "/info"), ("HEAD", "/info")):
        reply = gateway.client.request(verb, path, headers=JSON | headers)
        assert reply.status_code == 200
        assert not {*headers} & {*gateway.service.calls[-1].metadata}


def test_grpc_callers_keep_their_headers(gateway: Gateway) -> None:
    metadata = (("x-mine-bin", b"\x00\xff"), ("x.y", "1"))
    with gateway.channel() as channel:
        call = gateway.stub(channel, "Generate")
        call(gateway.messages.new("GenerateRequest"), metadata=metadata, timeout=DEADLINE)
    seen = gateway.service.calls[-1].metadata
    assert seen["x-mine-bin"] == str(b"\x00\xff")
    assert seen["x.y"] == "1"


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
    assert reply.headers["access-control-allow-methods"] == "GET,HEAD,POST"
    assert reply.headers["access-control-max-age"] == "7200"
    assert not gateway.service.calls


def test_preflight_allows_whatever_headers_a_page_wants_to_send(gateway: Gateway) -> None:
    asked = "authorization,content-type,traceparent,x-grpc-web,x-stainless-lang,x-tool-call-format"
    preflight = PREFLIGHT | {"origin": "https://a.example", "access-control-request-headers": asked}
    reply = gateway.client.options("/v1/chat/completions", headers=preflight)
    assert reply.headers["access-control-allow-headers"] == asked
    del preflight["access-control-request-headers"]
    reply = gateway.client.options("/v1/chat/completions", headers=preflight)
    assert reply.status_code == 200
    assert "access-control-allow-headers" not in reply.headers


def test_page_can_read_our_headers(gateway: Gateway) -> None:
    origin = {"origin": "https://a.example"}
    for reply in [
        gateway.client.post("/generate", json={}, headers=origin),
        gateway.client.get("/nope", headers=origin),
    ]:
        exposed = reply.headers["access-control-expose-headers"].split(",")
        assert {"x-request-id", "x-compute-time", "x-generated-tokens", "retry-after"} <= {*exposed}
    assert "access-control-expose-headers" not in gateway.client.get("/info").headers


def test_page_of_any_origin_can_read_answers_and_errors(gateway: Gateway) -> None:
    origin = {"origin": "https://a.example"}
    gateway.service.fail("TokenizeStream", grpc.StatusCode.INTERNAL, "")
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
