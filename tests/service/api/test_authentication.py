"""API keys: who is let in, on the service's own port and from the gateway, and what others get."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from service.access.keys import ApiKeys, key_line, make_key, parse_keys
from service.api.authentication import EXEMPTIONS, Authenticator
from service.errors import ServiceError
from service.generation.metrics import Metrics
from service.launch.settings import Exemption
from service.routes import ADMIN_METHODS, SERVICE
from tests.service.fakes import LIMITS, TIMEOUT_S, eventually, sample, serving, trailers

ALICE, BOB = make_key(), make_key()
KEYS = parse_keys(f"{key_line('alice', ALICE)}\n{key_line('bob', BOB)}")
GENERATE, CHAT = f"/{SERVICE}/Generate", f"/{SERVICE}/Chat"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
FROM_ENVOY = ("x-envoy-external-address", "192.0.2.9")

REFUSED: list[Any] = [
    pytest.param([], "an API key is needed", id="none"),
    pytest.param([("authorization", "")], "an API key is needed", id="empty"),
    pytest.param([("authorization", f"Basic {ALICE}")], "an API key is needed", id="scheme"),
    pytest.param([("authorization", ALICE)], "an API key is needed", id="bare"),
    pytest.param([("authorization", "Bearer tw-wrong")], "wrong API key", id="wrong"),
    pytest.param([("authorization", f"Bearer {ALICE.lower()}x")], "wrong API key", id="nearly"),
    pytest.param([("authorization", f"Bearer {ALICE},{BOB}")], "wrong API key", id="joined"),
    pytest.param(
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")],
        "an API key is needed",
        id="two",
    ),
    pytest.param([("x-api-key", ALICE)], "an API key is needed", id="other-header"),
]


class Service:
    """Methods that note what reached them, behind an interceptor with keys."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.metrics = Metrics(LIMITS)
        self.keys: ApiKeys | None = KEYS

    async def unary(self, request: bytes, _: Any) -> bytes:
        self.received.append(request)
        return request

    async def stream(self, request: bytes, context: Any) -> None:
        self.received.append(request)
        await context.write(request)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of any method."""
        if details.method in (CHAT, REFLECTION):
            return grpc.unary_stream_rpc_method_handler(self.stream)
        return grpc.unary_unary_rpc_method_handler(self.unary)

    def serving(self, *exempt: str, from_gateway: bool = False) -> Any:
        authenticator = Authenticator(lambda: self.keys or KEYS, exempt)
        return serving(
            self,  # type: ignore[arg-type]
            self.metrics,
            from_gateway=from_gateway,
            access_log=True,
            authenticator=authenticator,
        )


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def channel(service: Service) -> AsyncGenerator[aio.Channel]:
    async with service.serving() as channel:
        yield channel


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


async def ask(
    channel: aio.Channel, method: str, metadata: Any = (), request: bytes = b"x"
) -> bytes:
    if method in (CHAT, REFLECTION):
        call = channel.unary_stream(method)(request, metadata=metadata, timeout=TIMEOUT_S)
        return b"".join([reply async for reply in call])
    reply: bytes = await channel.unary_unary(method)(request, metadata=metadata, timeout=TIMEOUT_S)
    return reply


@pytest.mark.parametrize("method", [GENERATE, CHAT, HEALTH, REFLECTION])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_right_key_is_let_in(channel: aio.Channel, method: str, scheme: str) -> None:
    assert await ask(channel, method, [("authorization", f"{scheme} {ALICE}")]) == b"x"


@pytest.mark.parametrize("method", [GENERATE, CHAT, HEALTH, REFLECTION])
@pytest.mark.parametrize(("metadata", "text"), REFUSED)
async def test_others_are_refused_and_nothing_reaches_a_handler(
    service: Service, channel: aio.Channel, method: str, metadata: Any, text: str
) -> None:
    with pytest.raises(aio.AioRpcError) as failed:
        await ask(channel, method, metadata)
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert text in str(failed.value.details())
    status = status_pb2.Status.FromString(trailers(failed.value)["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("UNAUTHENTICATED", SERVICE)
    assert info.metadata["error_type"] == "unauthenticated"
    assert not service.received


async def test_large_request_is_refused_as_soon(service: Service, channel: aio.Channel) -> None:
    """It exceeds what the server takes, so reading it would end in another status."""
    with pytest.raises(aio.AioRpcError) as failed:
        await ask(channel, GENERATE, request=bytes(8 << 20))
    assert failed.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not service.received


async def test_rest_callers_get_status_and_body(service: Service) -> None:
    async with service.serving(from_gateway=True) as channel:
        with pytest.raises(aio.AioRpcError) as failed:
            await ask(channel, GENERATE, [FROM_ENVOY, ("x-envoy-original-path", "/generate")])
    said = trailers(failed.value)
    assert said["x-http-status"] == "401"
    assert json.loads(said["x-error-body"]) == {
        "error": "an API key is needed: `authorization: Bearer KEY`",
        "error_type": "unauthenticated",
    }


METHODS = {
    "health": [HEALTH, "/grpc.health.v1.Health/List", f"/{SERVICE}/Health"],
    "metrics": [f"/{SERVICE}/Metrics"],
    "reflection": [REFLECTION, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"],
    "docs": [f"/{SERVICE}/Docs", f"/{SERVICE}/OpenApi"],
}


@pytest.mark.parametrize("name", METHODS)
async def test_exemption_opens_what_belongs_to_it_and_nothing_else(
    service: Service, name: str
) -> None:
    async with service.serving(name) as channel:
        for other, methods in METHODS.items():
            for method in methods:
                if other == name:
                    assert await ask(channel, method) == b"x"
                    assert await ask(channel, method, bearer("tw-wrong")) == b"x"
                    continue
                with pytest.raises(aio.AioRpcError):
                    await ask(channel, method)
        for method in (GENERATE, f"/{SERVICE}/Info", f"/{SERVICE}/HealthCheck"):
            with pytest.raises(aio.AioRpcError):
                await ask(channel, method)


def test_every_exemption_has_methods() -> None:
    assert set(EXEMPTIONS) == set(METHODS) == set(Exemption.__args__) - {"none"}  # type: ignore[attr-defined]


async def test_envoy_and_the_supervisor_may_always_ask_for_health(service: Service) -> None:
    async with service.serving(from_gateway=True) as channel:
        assert await ask(channel, HEALTH) == b"x"
        with pytest.raises(aio.AioRpcError):
            await ask(channel, HEALTH, [FROM_ENVOY])  # a caller of Envoy's
        with pytest.raises(aio.AioRpcError):
            await ask(channel, GENERATE)
    async with service.serving() as channel:
        with pytest.raises(aio.AioRpcError):
            await ask(channel, HEALTH)


async def test_key_that_was_removed_is_refused(service: Service, channel: aio.Channel) -> None:
    assert await ask(channel, GENERATE, bearer(BOB)) == b"x"
    service.keys = parse_keys(key_line("alice", ALICE))
    with pytest.raises(aio.AioRpcError):
        await ask(channel, GENERATE, bearer(BOB))
    assert await ask(channel, GENERATE, bearer(ALICE)) == b"x"


async def test_name_stands_in_log_and_metrics_and_the_key_nowhere(
    service: Service, channel: aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def lines() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "service.access"]

    await ask(channel, GENERATE, [*bearer(BOB), ("x-tenant", "someone-else")])
    with pytest.raises(aio.AioRpcError):
        await ask(channel, GENERATE, [*bearer("tw-wrong"), ("x-tenant", "someone-else")])
    await eventually(lambda: len(lines()) == 2)
    callers = [line.fields["caller"] for line in lines()]  # type: ignore[attr-defined]
    assert callers == ["bob", "127.0.0.1"]
    exposition = service.metrics.exposition()
    assert sample(exposition, 'tokenwire_calls_total{caller="bob",code="OK"}') == 1
    assert sample(exposition, 'tokenwire_calls_total{caller="",code="UNAUTHENTICATED"}') == 1
    for secret in (BOB, "tw-wrong"):
        assert secret not in exposition.decode() + str([vars(line) for line in caplog.records])


ADMIN = make_key()
ADMIN_KEYS = parse_keys(key_line("root", ADMIN))


def admitted(authenticator: Authenticator, method: str, *keys: str) -> str | None:
    """The name of whoever calls a method, or the kind of the refusal."""
    metadata = [("authorization", f"Bearer {key}") for key in keys]
    try:
        return authenticator.admit(method, metadata, from_gateway=False)
    except ServiceError as error:
        return error.kind.name


@pytest.mark.parametrize("method", ADMIN_METHODS)
def test_only_an_admin_key_opens_what_is_for_admins(method: str) -> None:
    guarded = Authenticator(lambda: KEYS, ("health",), lambda: ADMIN_KEYS)
    assert admitted(guarded, method, ADMIN) == admitted(guarded, GENERATE, ADMIN) == "root"
    assert admitted(guarded, method, ALICE) == "FORBIDDEN"
    assert admitted(guarded, method, "tw-wrong") == "UNAUTHENTICATED"
    assert admitted(guarded, method) == "UNAUTHENTICATED"
    assert list(guarded.names()) == ["alice", "bob", "root"]


@pytest.mark.parametrize("keys", [None, lambda: KEYS])
def test_without_admin_keys_there_are_no_admins(keys: Any) -> None:
    for key in (ALICE, ADMIN):
        assert admitted(Authenticator(keys), ADMIN_METHODS[0], key) == "FORBIDDEN"


def test_an_admin_key_alone_leaves_all_else_open() -> None:
    open_to_all = Authenticator(None, (), lambda: ADMIN_KEYS)
    assert admitted(open_to_all, GENERATE) is None
    assert admitted(open_to_all, GENERATE, ADMIN) == "root"
    assert admitted(open_to_all, ADMIN_METHODS[0]) == "UNAUTHENTICATED"
