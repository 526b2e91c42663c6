"""The statuses and details of failed calls, and that every call is counted once."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from service.errors import ErrorKind, ServiceError, missing_field, overloaded, unhealthy
from service.generation.metrics import Metrics
from service.routes import SERVICE
from tests.service.api.harness import REST
from tests.service.fakes import LIMITS, TIMEOUT_S, eventually, sample, serving, trailers

UNARY, STREAM = "/test.Service/Unary", "/test.Service/Stream"

# error_type, REST status, gRPC code, prefix: the table of the contract.
STATUSES = {
    ErrorKind.VALIDATION: ("validation", 422, "INVALID_ARGUMENT", "Input validation error: "),
    ErrorKind.JSON: (
        "validation",
        400,
        "INVALID_ARGUMENT",
        "Failed to parse the request body as JSON: ",
    ),
    ErrorKind.SHAPE: (
        "validation",
        422,
        "INVALID_ARGUMENT",
        "Failed to deserialize the JSON body into the target type: ",
    ),
    ErrorKind.TEMPLATE: ("template_error", 422, "INVALID_ARGUMENT", "Template error: "),
    ErrorKind.TOOL: ("tool_error", 422, "INVALID_ARGUMENT", "Tool error: "),
    ErrorKind.SUFFIX: ("suffix not supported", 422, "INVALID_ARGUMENT", ""),
    ErrorKind.BATCH_SIZE: ("batch size exceeded", 422, "INVALID_ARGUMENT", ""),
    ErrorKind.OVERLOADED: ("overloaded", 429, "RESOURCE_EXHAUSTED", ""),
    ErrorKind.CANCELLED: ("cancelled", 499, "CANCELLED", ""),
    ErrorKind.GENERATION: ("generation", 424, "ABORTED", "Request failed during generation: "),
    ErrorKind.INCOMPLETE: ("incomplete_generation", 500, "INTERNAL", ""),
    ErrorKind.INTERNAL: ("internal", 500, "INTERNAL", ""),
    ErrorKind.UNHEALTHY: ("healthcheck", 503, "UNAVAILABLE", ""),
    ErrorKind.SLOW_READER: ("slow_reader", 408, "DEADLINE_EXCEEDED", ""),
    ErrorKind.ADAPTER: ("adapter", 400, "INVALID_ARGUMENT", ""),
    ErrorKind.ADAPTER_LOADED: ("adapter_loaded", 400, "ALREADY_EXISTS", ""),
    ErrorKind.TOO_MANY_ADAPTERS: ("too_many_adapters", 400, "FAILED_PRECONDITION", ""),
    ErrorKind.FORBIDDEN: ("forbidden", 403, "PERMISSION_DENIED", ""),
    ErrorKind.NOT_FOUND: ("not_found", 404, "NOT_FOUND", ""),
    ErrorKind.UNAUTHENTICATED: ("unauthenticated", 401, "UNAUTHENTICATED", ""),
}


class Outcome:
    """What the next call does: it raises or waits; otherwise it answers."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.error: Exception | None = None
        self.waits = False
        self.num_waiting = 0

    async def unary(self, request: bytes, _: Any) -> bytes:
        await self._decide()
        return request

    async def stream(self, request: bytes, context: Any) -> None:
        await context.write(request)
        await self._decide()
        await context.write(request)

    async def _decide(self) -> None:
        if self.error is not None:
            raise self.error
        if self.waits:
            self.num_waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_waiting -= 1

    def count(self, method: str, code: str) -> float:
        name = f'grpc_server_handled_total{{code="{code}",method="{method}"}}'
        return sample(self.metrics.exposition(), name)

    def in_progress(self, method: str) -> float:
        return sample(self.metrics.exposition(), f'grpc_server_in_progress{{method="{method}"}}')

    async def ended(self, method: str, code: str) -> None:
        """Waits until the one call so far has been counted."""
        await eventually(lambda: self.count(method, code) == 1)
        assert self.in_progress(method) == 0
        name = f'grpc_server_handling_seconds_count{{method="{method}"}}'
        assert sample(self.metrics.exposition(), name) == 1


@pytest.fixture
def outcome() -> Outcome:
    return Outcome(Metrics(LIMITS))


@pytest.fixture
async def channel(outcome: Outcome) -> AsyncGenerator[aio.Channel]:
    handlers = grpc.method_handlers_generic_handler(
        "test.Service",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(outcome.unary),
            "Stream": grpc.unary_stream_rpc_method_handler(outcome.stream),
        },
    )
    async with serving(handlers, outcome.metrics, from_gateway=True) as channel:
        yield channel


async def call(channel: aio.Channel, method: str, *, rest: bool = False) -> list[bytes]:
    """The replies of a call."""
    metadata = REST if rest else None
    async with asyncio.timeout(TIMEOUT_S):
        if method == UNARY:
            return [await channel.unary_unary(UNARY)(b"x", metadata=metadata)]
        return [reply async for reply in channel.unary_stream(STREAM)(b"x", metadata=metadata)]


async def failure(channel: aio.Channel, method: str, *, rest: bool = False) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as failed:
        await call(channel, method, rest=rest)
    return failed.value


def details(error: aio.AioRpcError) -> tuple[status_pb2.Status, dict[str, Any]]:
    """The rich status, and its details by their type."""
    status = status_pb2.Status.FromString(trailers(error)["grpc-status-details-bin"])
    messages = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        assert packed.Unpack(message)
        messages[name] = message
    return status, messages


def test_the_table_has_every_kind() -> None:
    assert set(STATUSES) == set(ErrorKind)


@pytest.mark.parametrize("method", [UNARY, STREAM])
@pytest.mark.parametrize("kind", ErrorKind, ids=lambda kind: kind.name)
async def test_an_error_has_its_statuses_and_details(
    channel: aio.Channel, outcome: Outcome, kind: ErrorKind, method: str
) -> None:
    error_type, http_status, code, prefix = STATUSES[kind]
    text = 'why "é"'
    outcome.error = ServiceError(kind, text)
    rest = await failure(channel, method, rest=True)
    assert rest.code().name == code
    assert trailers(rest)["x-http-status"] == str(http_status)
    body = json.dumps({"error": prefix + text, "error_type": error_type}, separators=(",", ":"))
    assert trailers(rest)["x-error-body"] == body
    assert ("retry-after" in trailers(rest)) == (kind is ErrorKind.OVERLOADED)
    assert "grpc-status-details-bin" not in trailers(rest)

    error = await failure(channel, method)
    assert error.code().name == code
    assert error.details() == ("" if "JSON" in prefix else prefix) + text
    assert not {"x-http-status", "x-error-body"} & trailers(error).keys()
    status, found = details(error)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    assert found["ErrorInfo"].reason == kind.name
    assert found["ErrorInfo"].domain == SERVICE
    assert found["ErrorInfo"].metadata == {"error_type": error_type}
    assert ("RetryInfo" in found) == (kind is ErrorKind.OVERLOADED)
    assert ("retry-after" in trailers(error)) == (kind is ErrorKind.OVERLOADED)
    assert "BadRequest" not in found
    await eventually(lambda: outcome.count(method, code) == 2)


async def test_an_overloaded_server_tells_when_to_retry(
    channel: aio.Channel, outcome: Outcome
) -> None:
    outcome.error = overloaded()
    error = await failure(channel, UNARY)
    assert details(error)[1]["RetryInfo"].retry_delay.seconds == 1
    assert trailers(error)["retry-after"] == "1"
    assert error.details() == "Model is overloaded"


async def test_an_unhealthy_server_has_its_error_type(
    channel: aio.Channel, outcome: Outcome
) -> None:
    outcome.error = unhealthy()
    error = await failure(channel, UNARY, rest=True)
    assert trailers(error)["x-error-body"] == '{"error":"unhealthy","error_type":"healthcheck"}'


async def test_the_offending_field_is_named(channel: aio.Channel, outcome: Outcome) -> None:
    outcome.error = missing_field("inputs")
    error = await failure(channel, UNARY)
    (violation,) = details(error)[1]["BadRequest"].field_violations
    assert violation.field == "inputs"
    assert violation.description == error.details()
    assert error.details() == "missing field `inputs`"


@pytest.mark.parametrize("method", [UNARY, STREAM])
async def test_unexpected_errors_are_logged_and_not_sent(
    channel: aio.Channel,
    outcome: Outcome,
    method: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcome.error = RuntimeError("a secret")
    with caplog.at_level(logging.ERROR, "service.api.interceptor"):
        error = await failure(channel, method, rest=True)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "Internal server error"
    assert trailers(error)["x-http-status"] == "500"
    assert "secret" not in str(error.trailing_metadata())
    assert "a secret" in caplog.text
    await outcome.ended(method, "INTERNAL")


@pytest.mark.parametrize("method", [UNARY, STREAM])
async def test_a_good_call_is_counted(channel: aio.Channel, outcome: Outcome, method: str) -> None:
    assert await call(channel, method) == [b"x"] * (1 if method == UNARY else 2)
    await outcome.ended(method, "OK")


@pytest.mark.parametrize("method", [UNARY, STREAM])
async def test_a_cancelled_call_is_counted(
    channel: aio.Channel, outcome: Outcome, method: str
) -> None:
    outcome.waits = True
    start = channel.unary_unary if method == UNARY else channel.unary_stream
    running = start(method)(b"x")
    await eventually(lambda: outcome.num_waiting == 1)
    assert outcome.in_progress(method) == 1
    assert running.cancel()
    await outcome.ended(method, "CANCELLED")
    assert outcome.num_waiting == 0


async def test_an_unknown_method_is_not_counted(channel: aio.Channel, outcome: Outcome) -> None:
    with pytest.raises(aio.AioRpcError) as failed:
        await channel.unary_unary("/test.Service/Nothing")(b"")
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert b"Nothing" not in outcome.metrics.exposition()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" * 450, id="letters"),
        pytest.param("é" * 220, id="accents"),
        pytest.param("😀" * 110, id="emoji"),
    ],
)
async def test_a_short_message_is_not_cut(
    channel: aio.Channel, outcome: Outcome, text: str
) -> None:
    outcome.error = ServiceError(ErrorKind.SUFFIX, text)
    body = trailers(await failure(channel, UNARY, rest=True))["x-error-body"]
    assert json.loads(body)["error"] == text


@pytest.mark.parametrize("char", ["x", "é", '"', "😀", "\x01"], ids=ascii)
async def test_a_long_message_is_cut_everywhere(
    channel: aio.Channel, outcome: Outcome, char: str
) -> None:
    """Clients drop trailers above 8 KiB and would see another error than ours."""
    outcome.error = ServiceError(ErrorKind.TEMPLATE, char * 50_000, field="messages")
    assert (await failure(channel, UNARY)).code() is grpc.StatusCode.INVALID_ARGUMENT
    error = await failure(channel, UNARY, rest=True)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"Template error: {char}")
    body = trailers(error)["x-error-body"]
    assert len(body) <= 4096
    assert body.isascii()
    assert json.loads(body)["error"].startswith(f"Template error: {char}")


async def test_a_long_message_is_cut_in_the_body(channel: aio.Channel, outcome: Outcome) -> None:
    """Long enough to be cut in the body, short enough for the other trailers."""
    outcome.error = ServiceError(ErrorKind.SUFFIX, "é" * 700)
    body = trailers(await failure(channel, UNARY, rest=True))["x-error-body"]
    assert len(body) <= 4096
    assert body.isascii()
    text = json.loads(body)["error"]
    assert text.endswith("…")
    assert text.startswith("é" * 100)


async def test_a_message_of_emoji_is_cut_in_the_body(
    channel: aio.Channel, outcome: Outcome
) -> None:
    outcome.error = ServiceError(ErrorKind.SUFFIX, "😀" * 520)
    body = trailers(await failure(channel, UNARY, rest=True))["x-error-body"]
    assert len(body) <= 4096
    assert json.loads(body)["error_type"] == "suffix not supported"


class Held:
    """Something that a request brings."""


async def test_what_a_failed_call_held_is_free_at_once(
    channel: aio.Channel, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Held]] = []

    async def fail() -> None:
        body = Held()
        held.append(weakref.ref(body))
        error = missing_field("inputs")  # which its own frame holds
        raise error

    monkeypatch.setattr(outcome, "_decide", fail)
    gc.disable()
    try:
        with pytest.raises(aio.AioRpcError):
            await channel.unary_unary(UNARY)(b"x")
        await eventually(lambda: held[0]() is None)
    finally:
        gc.enable()
