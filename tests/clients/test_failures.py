"""How calls of both clients fail, and which of them are made again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc import aio
from tokenwire_client import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    RetryPolicy,
    Timeouts,
    TokenwireError,
    UnauthenticatedError,
    UnavailableError,
)
from tokenwire_client.errors import error_of
from tokenwire_client.messages import GenerateResponse, GenerateStreamResponse

from service.access.keys import key_line, make_key, parse_keys
from service.api.authentication import Authenticator
from service.errors import ErrorKind, ServiceError, overloaded, unhealthy
from service.routes import SERVICE
from tests.clients.callers import KINDS, Caller, calling
from tests.clients.conftest import Served
from tests.service.api.harness import PROMPT, Service
from tests.service.fakes import listening, script, step

AT_ONCE = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.01)
MESSAGES = [{"role": "user", "content": "hello"}]

either_client = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@dataclass
class Server:
    """Answers Generate and GenerateStream with failures first, and then well."""

    failures: list[Exception]
    fails_late: bool = False  # after the first message of a stream
    text: str = "done"
    num_calls: int = 0
    stuck: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, _: bytes, __: Any) -> bytes:
        self._fail()
        return GenerateResponse(generated_text=self.text).SerializeToString()

    async def generate_stream(self, _: bytes, context: Any) -> None:
        message = GenerateStreamResponse(index=1).SerializeToString()
        if self.fails_late:
            await context.write(message)
        self._fail()
        await context.write(message)

    async def hang(self, _: bytes, __: Any) -> bytes:
        await self.stuck.wait()
        return b""

    def _fail(self) -> None:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[str]:
        handlers = {
            "Generate": grpc.unary_unary_rpc_method_handler(self.generate),
            "GenerateStream": grpc.unary_stream_rpc_method_handler(self.generate_stream),
            "Health": grpc.unary_unary_rpc_method_handler(self.generate),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self.hang),
            "Info": grpc.unary_unary_rpc_method_handler(self.hang),
        }
        async with listening(grpc.method_handlers_generic_handler(SERVICE, handlers)) as port:
            yield f"127.0.0.1:{port}"


@asynccontextmanager
async def calling_it(kind: type[Any], server: Server, **options: Any) -> AsyncGenerator[Caller]:
    async with (
        server.running() as address,
        calling(kind, address, **{"retries": AT_ONCE, **options}) as caller,
    ):
        yield caller


@either_client
@pytest.mark.parametrize("failure", [overloaded, unhealthy], ids=["overloaded", "unavailable"])
async def test_a_server_that_is_busy_is_asked_again(
    kind: type[Any], failure: Callable[[], ServiceError]
) -> None:
    server = Server([failure(), failure()])
    async with calling_it(kind, server) as caller:
        assert (await caller.call("generate", PROMPT)).generated_text == "done"
    assert server.num_calls == 3


@either_client
async def test_a_stream_that_has_not_begun_is_asked_for_again(kind: type[Any]) -> None:
    server = Server([overloaded()])
    async with calling_it(kind, server) as caller:
        (event,) = await caller.collect("generate_stream", PROMPT)
    assert (event.index, server.num_calls) == (1, 2)


@either_client
async def test_a_stream_that_has_begun_is_not_asked_for_again(kind: type[Any]) -> None:
    server = Server([unhealthy()], fails_late=True)
    async with calling_it(kind, server) as caller:
        with pytest.raises(UnavailableError):
            await caller.collect("generate_stream", PROMPT)
    assert server.num_calls == 1


@either_client
async def test_attempts_are_bounded_and_the_last_failure_counts(kind: type[Any]) -> None:
    server = Server([overloaded() for _ in range(9)])
    retries = RetryPolicy(max_attempts=2, initial_backoff_s=0.01, max_backoff_s=0.01)
    async with calling_it(kind, server, retries=retries) as caller:
        with pytest.raises(OverloadedError) as raised:
            await caller.call("generate", PROMPT)
    assert server.num_calls == 2
    assert raised.value.retry_delay_s == 1.0
    assert raised.value.error_type == "overloaded"
    assert raised.value.request_id


@either_client
async def test_an_answer_may_be_larger_than_grpc_usually_takes(kind: type[Any]) -> None:
    text = "x" * 5 * 2**20
    async with calling_it(kind, Server([], text=text)) as caller:
        assert (await caller.call("generate", PROMPT)).generated_text == text


@either_client
async def test_without_a_policy_nothing_is_asked_again(kind: type[Any]) -> None:
    server = Server([unhealthy()])
    async with calling_it(kind, server, retries=None) as caller:
        with pytest.raises(UnavailableError):
            await caller.call("generate", PROMPT)
    assert server.num_calls == 1


@either_client
async def test_health_and_other_failures_are_not_asked_again(kind: type[Any]) -> None:
    defect = ServiceError(ErrorKind.INTERNAL, "a defect")
    server = Server([unhealthy(), defect])
    async with calling_it(kind, server) as caller:
        assert await caller.call("health") is False
        with pytest.raises(TokenwireError, match="INTERNAL: a defect") as raised:
            await caller.call("generate", PROMPT)
    assert type(raised.value) is TokenwireError
    assert server.num_calls == 2


@either_client
@pytest.mark.parametrize(
    ("name", "timeouts"),
    [("tokenize", Timeouts(tokenize_s=0.05)), ("info", Timeouts(info_s=0.05))],
)
async def test_every_method_has_a_deadline(kind: type[Any], name: str, timeouts: Timeouts) -> None:
    async with calling_it(kind, Server([]), timeouts=timeouts) as caller:
        with pytest.raises(DeadlineExceededError):
            await caller.call(name, *(["x"] if name == "tokenize" else []))


@either_client
async def test_a_call_may_have_a_shorter_deadline(kind: type[Any]) -> None:
    async with calling_it(kind, Server([])) as caller:
        with pytest.raises(DeadlineExceededError) as raised:
            await caller.call("info", timeout_s=0.05)
    assert raised.value.error_type is None


@either_client
async def test_a_server_that_does_not_exist_is_unavailable(
    kind: type[Any], unused_tcp_port: int
) -> None:
    async with calling(kind, f"127.0.0.1:{unused_tcp_port}", retries=None) as caller:
        assert await caller.call("health") is False
        with pytest.raises(UnavailableError) as raised:
            await caller.call("info")
    assert raised.value.request_id is None


@either_client
@pytest.mark.parametrize(
    ("name", "argument", "options", "field_name"),
    [
        ("generate", "", {}, "inputs"),
        ("generate", PROMPT, {"temperature": -1.0}, "parameters.temperature"),
        ("generate_stream", PROMPT, {"best_of": 2}, "parameters.best_of"),
        ("chat", MESSAGES, {"top_p": 2.0}, "top_p"),
        ("chat_stream", MESSAGES, {"max_tokens": 0}, "max_tokens"),
        ("completions", [], {}, "prompt"),
    ],
)
async def test_an_invalid_request_names_its_field(
    served: Served, kind: type[Any], name: str, argument: Any, options: Any, field_name: str
) -> None:
    async with calling(kind, served.address) as caller:
        method = caller.collect if name.endswith("stream") else caller.call
        with pytest.raises(InvalidRequestError) as raised:
            await method(name, argument, **options)
    error = raised.value
    assert (error.field, error.error_type) == (field_name, "validation")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(error) == f"INVALID_ARGUMENT: {error.message}"


@either_client
async def test_a_generation_that_breaks_off_is_an_error(served: Served, kind: type[Any]) -> None:
    served.service.use_script(script(step(5), step(error="out of memory")))
    async with calling(kind, served.address) as caller:
        with pytest.raises(GenerationError) as raised:
            await caller.collect("generate_stream", PROMPT)
    assert raised.value.error_type == "generation"
    assert raised.value.__cause__ is not None


@either_client
async def test_metadata_goes_with_every_call(served: Served, kind: type[Any]) -> None:
    metadata = {"x-request-id": "mine"}
    async with calling(kind, served.address, metadata=metadata) as caller:
        for method in (caller.call, caller.collect):
            name = "generate" if method == caller.call else "generate_stream"
            with pytest.raises(InvalidRequestError) as raised:
                await method(name, "")
            assert raised.value.request_id == "mine"


@either_client
async def test_a_key_lets_calls_in(kind: type[Any]) -> None:
    key = make_key()
    keys = parse_keys(key_line("alice", key))
    service = Service()
    handlers = service.handlers()
    authenticator = Authenticator(lambda: keys)
    async with listening(handlers, service.metrics, authenticator=authenticator) as port:
        address = f"127.0.0.1:{port}"
        async with calling(kind, address, api_key=key) as caller:
            await caller.call("generate", PROMPT)
            assert await caller.collect("generate_stream", PROMPT)
        for wrong in ({}, {"api_key": "tw-wrong"}):
            async with calling(kind, address, **wrong) as caller:
                for method in (caller.call, caller.collect):
                    name = "generate" if method == caller.call else "generate_stream"
                    with pytest.raises(UnauthenticatedError) as raised:
                        await method(name, PROMPT)
                    assert raised.value.error_type == "unauthenticated"


@pytest.mark.parametrize("kind", KINDS)
def test_two_authorizations_are_refused(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="not both"):
        kind("127.0.0.1:1", api_key="a", metadata={"Authorization": "Bearer b"})


@pytest.mark.parametrize(
    "wrong",
    [{"max_attempts": 1}, {"initial_backoff_s": 0.001}, {"max_backoff_s": 0}, {"multiplier": 0}],
)
def test_a_policy_that_grpc_cannot_follow_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempts"):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("raw", [b"", b"\xff\xff no status"])
def test_an_error_without_readable_details_has_none(raw: bytes) -> None:
    metadata = aio.Metadata(("grpc-status-details-bin", raw))
    failed = aio.AioRpcError(grpc.StatusCode.UNKNOWN, aio.Metadata(), metadata, "odd")
    error = error_of(failed)
    assert (error.code, error.message) == (grpc.StatusCode.UNKNOWN, "odd")
    assert (error.error_type, error.field, error.retry_delay_s) == (None, None, None)
