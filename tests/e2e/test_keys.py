"""A server with API keys: over REST, gRPC and gRPC-Web, on its own port and through Envoy."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.access.keys import key_line, make_key
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, SERVICE, Stack, running, wait_until

BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer tw-wrong"},
    {"authorization": "Basic dXNlcjpwYXNz"},
]


@dataclass(frozen=True)
class Guarded:
    """A server, its file of keys, and the key of alice, who is in it."""

    stack: Stack
    file: Path
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return bearer(self.key)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    file, key = directory / "keys", make_key()
    file.write_text(key_line("alice", key) + "\n")
    flags = (f"--api-key-file={file}", "--json-output")
    with running(directory / "log", *flags) as stack:
        yield Guarded(stack, file, key)


@pytest.fixture(params=["direct", "through_envoy"])
def channel(guarded: Guarded, request: pytest.FixtureRequest) -> grpc.Channel:
    channel: grpc.Channel = getattr(guarded.stack, request.param)
    return channel


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def lines(stack: Stack, request_id: str) -> list[dict[str, Any]]:
    """The lines of the access log about one request."""
    found = [json.loads(line) for line in stack.log().splitlines() if line.startswith("{")]
    return [line for line in found if line.get("request_id") == request_id and "path" in line]


def caller_of(stack: Stack, request_id: str) -> str:
    """The caller's name in the access log."""
    wait_until(lambda: bool(lines(stack, request_id)), f"a line about {request_id}")
    return str(lines(stack, request_id)[0]["caller"])


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", BODY), ("/generate_stream", BODY), ("/", BODY), ("/v1/chat/completions", CHAT)],
)
@pytest.mark.parametrize("headers", WRONG)
def test_rest_needs_a_key(
    guarded: Guarded, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert guarded.stack.http.post(path, json=body, headers=guarded.headers).status_code == 200
    refused = guarded.stack.http.post(path, json=body, headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["content-type"] == "application/json"
    assert refused.headers["x-request-id"]
    assert set(refused.json()) == {"error", "error_type"}
    assert refused.json()["error_type"] == "unauthenticated"


@pytest.mark.parametrize("path", ["/info", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_all_that_is_not_exempted_needs_a_key(guarded: Guarded, path: str) -> None:
    assert guarded.stack.http.get(path, headers=guarded.headers).status_code == 200
    assert guarded.stack.http.get(path).status_code == 401
    assert guarded.stack.http.head(path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
@pytest.mark.parametrize("headers", WRONG)
def test_health_needs_none(guarded: Guarded, path: str, headers: dict[str, str]) -> None:
    assert guarded.stack.http.get(path, headers=headers).status_code == 200


def test_invalid_and_large_requests_are_refused_unread(guarded: Guarded) -> None:
    for content in (b"{", b"[" * 10_000, b'{"inputs":"' + bytes(1 << 20) + b'"}'):
        refused = guarded.stack.http.post(
            "/generate", content=content, headers={"content-type": "application/json"}
        )
        assert refused.status_code == 401


def test_native_grpc_needs_a_key(guarded: Guarded, channel: grpc.Channel) -> None:
    stream = channel.unary_stream(f"/{SERVICE}/GenerateStream")
    unary = channel.unary_unary(f"/{SERVICE}/Info")
    allowed = tuple(guarded.headers.items())
    assert unary(b"", metadata=allowed, timeout=DEADLINE_S)
    for headers in WRONG:
        for call in (unary, lambda *a, **k: list(stream(*a, **k))):
            with pytest.raises(grpc.RpcError) as failed:
                call(b"", metadata=tuple(headers.items()), timeout=DEADLINE_S)
            error: Any = failed.value
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            trailers = dict(error.trailing_metadata())
            status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert info.reason == "UNAUTHENTICATED"


def test_reflection_needs_a_key_and_health_does_not(
    guarded: Guarded, channel: grpc.Channel
) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        ReflectionClient(channel).services()
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("headers", WRONG)
def test_grpc_web_needs_a_key(guarded: Guarded, headers: dict[str, str]) -> None:
    def ask(headers: dict[str, str]) -> httpx.Response:
        return guarded.stack.http.post(
            f"/{SERVICE}/Info",
            content=struct.pack(">BI", 0, 0),
            headers={"content-type": "application/grpc-web+proto", "x-grpc-web": "1", **headers},
        )

    assert status_of(ask(guarded.headers)) == "0"
    assert status_of(ask(headers)) == "16"


def status_of(reply: httpx.Response) -> str:
    """The gRPC status, in the headers or in the last frame."""
    if "grpc-status" in reply.headers:
        return str(reply.headers["grpc-status"])
    trailers = reply.content.rpartition(b"grpc-status:")[2]
    return trailers.split(b"\r\n")[0].strip().decode()


def test_name_of_the_caller_stands_in_log_and_metrics(guarded: Guarded) -> None:
    stack = guarded.stack
    tenant = {"x-tenant": "mallory"}
    stack.http.post(
        "/generate", json=BODY, headers={**guarded.headers, **tenant, "x-request-id": "by-rest"}
    )
    stack.direct.unary_unary(f"/{SERVICE}/Info")(
        b"", metadata=(*guarded.headers.items(), ("x-request-id", "by-grpc")), timeout=DEADLINE_S
    )
    assert caller_of(stack, "by-rest") == caller_of(stack, "by-grpc") == "alice"
    stack.http.post("/generate", json=BODY, headers={**tenant, "x-request-id": "by-nobody"})
    assert caller_of(stack, "by-nobody") == "127.0.0.1"
    metrics = stack.http.get("/metrics", headers=guarded.headers).text
    assert 'tokenwire_calls_total{caller="alice",code="OK"}' in metrics
    assert "mallory" not in metrics + stack.log()
    assert guarded.key not in metrics + stack.log()


def test_forged_headers_of_the_gateway_open_nothing(guarded: Guarded) -> None:
    forged = {"x-envoy-original-path": "/health", "x-forwarded-client-cert": "URI=alice"}
    assert guarded.stack.http.post("/generate", json=BODY, headers=forged).status_code == 401
    with pytest.raises(grpc.RpcError) as failed:
        guarded.stack.direct.unary_unary(f"/{SERVICE}/Info")(b"", metadata=tuple(forged.items()))
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_browsers_of_other_origins_may_not_call(guarded: Guarded) -> None:
    origin = {"origin": "https://a.example"}
    preflight = {"access-control-request-method": "POST"}
    for reply in (
        guarded.stack.http.post("/generate", json=BODY, headers=origin | guarded.headers),
        guarded.stack.http.options("/generate", headers=origin | preflight),
    ):
        assert "access-control-allow-origin" not in reply.headers


def test_sockets_are_for_the_servers_own_user(guarded: Guarded) -> None:
    (envoy,) = {guarded.stack.child("envoy")}
    directory = Path(envoy.cmdline()[envoy.cmdline().index("--config-path") + 1]).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    for name in ("gateway.sock", "admin.sock"):
        socket = directory / name
        assert socket.is_socket()
        assert socket.stat().st_mode & 0o777 == 0o600


def test_keys_change_while_the_server_runs(guarded: Guarded) -> None:
    stack, new = guarded.stack, make_key()

    def status(key: str) -> int:
        return stack.http.get("/info", headers=bearer(key)).status_code

    replacement = guarded.file.with_suffix(".new")
    replacement.write_text(f"{key_line('alice', guarded.key)}\n{key_line('bob', new)}\n")
    assert status(new) == 401
    replacement.replace(guarded.file)
    assert (status(new), status(guarded.key)) == (200, 200)
    guarded.file.write_text("not a line of keys\n")
    assert [status(new) for _ in range(3)] == [200] * 3
    complaint = "the API keys changed and cannot be used, the old ones stay"
    wait_until(lambda: complaint in stack.log(), "a word about it")
    stack.child("service").kill()  # the next one in its place has the old ones, too
    wait_until(lambda: status(new) == 200, "another service with the keys in force")
    assert status(guarded.key) == 200
    guarded.file.write_text(key_line("alice", guarded.key) + "\n")
    assert (status(new), status(guarded.key)) == (401, 200)
    channel_metadata = tuple(bearer(new).items())
    with pytest.raises(grpc.RpcError):
        stack.direct.unary_unary(f"/{SERVICE}/Info")(b"", metadata=channel_metadata)
    assert stack.log().count(complaint) == 2  # by each of the two
