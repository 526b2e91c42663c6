"""The whole service over a scripted engine, and the calls that tests make to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Self

import betterproto2
import grpc
from grpc import aio

from service.api import rpc
from service.api.servicer import TextGenerationServicer
from service.call_record import begin_record
from service.codec.plain import plain
from service.generation.admission import Admission
from service.generation.generator import Generator
from service.generation.load import LoadMeter
from service.generation.metrics import Metrics
from service.generation.pipeline import Pipeline
from service.generation.validation import Validator
from service.pb.google.api import HttpBody
from service.pb.google.protobuf import Value
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.service.fakes import (
    LANES,
    LIMITS,
    NO_GRAMMARS,
    SERVER,
    TIMEOUT_S,
    FakeEngineClient,
    Script,
    demo_tokenizer,
    serving,
    speaking,
    trailers,
)

SHAPE = "Failed to deserialize the JSON body into the target type: "
TEXT = " Grüße, 😀 said the fox.\n"
POOL = rpc.load_pool()
METHODS = {method.name: method for method in POOL.FindServiceByName(SERVICE).methods}
REPLIES: dict[str, Any] = {
    name: getattr(pb, method.output_type.name, HttpBody) for name, method in METHODS.items()
}
REST = [("x-envoy-original-path", "/any")]


@dataclass
class Answer:
    """Everything that a caller receives."""

    headers: dict[str, Any]
    replies: list[Any]
    error: aio.AioRpcError | None = None

    @property
    def body(self) -> bytes:
        """The bytes that the gateway passes on to a REST caller."""
        return b"".join(reply.http.data for reply in self.replies)

    @property
    def content_types(self) -> set[str]:
        return {reply.http.content_type for reply in self.replies}

    @property
    def json(self) -> Any:
        assert self.content_types == {"application/json"}
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of an SSE body; the end mark as it is."""
        assert self.content_types == {"text/event-stream"}
        assert self.body.endswith(b"\n\n")
        lines = self.body.decode().split("\n\n")[:-1]
        assert all(line.startswith("data: ") for line in lines)
        texts = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    @property
    def failure(self) -> aio.AioRpcError:
        assert self.error is not None
        return self.error


class Service:
    """A service over a scripted engine."""

    def __init__(self, engine_script: Script | None = None, tokenizer: Any = None) -> None:
        tokenizer = tokenizer or demo_tokenizer()
        self.client = FakeEngineClient(engine_script or speaking(TEXT))
        self.admission = Admission(LIMITS.max_concurrent_requests)
        self.metrics = Metrics(LIMITS)
        client: Any = self.client
        pipeline = Pipeline(
            self.admission,
            Validator(LIMITS, tokenizer, NO_GRAMMARS),
            Generator(client, tokenizer),
            self.metrics,
        )
        self.servicer = TextGenerationServicer(
            pipeline, tokenizer, client, SERVER, self.metrics, LoadMeter(), LANES
        )
        self.channel: aio.Channel  # of gRPC callers
        self.gateway: aio.Channel

    def is_idle(self) -> bool:
        """Whether nothing is generated, and all permits are back."""
        return not self.client.num_open and not self.admission.num_active

    def use_script(self, engine_script: Script) -> None:
        self.client.script = engine_script

    def call(self, name: str, request: Any, *, rest: bool) -> Any:
        """Begins a call of a gRPC caller, or of the gateway for a REST caller."""
        path, kind = f"/{SERVICE}/{name}", REPLIES[name]
        channel = self.gateway if rest else self.channel
        make = channel.unary_stream if METHODS[name].server_streaming else channel.unary_unary
        if rest:
            request = as_body(request)
        return make(path, bytes, kind.parse)(request, metadata=REST if rest else None)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Holds all permits, and the share of either caller: of the one of gRPC and of REST's."""
        with ExitStack() as held:
            for index, caller in enumerate(("127.0.0.1", "gateway")):
                begin_record(None, caller)
                count = LIMITS.max_concurrent_requests // (index + 1)
                held.enter_context(self.admission.permit(count))
            yield

    def handlers(self, *, from_gateway: bool = False) -> grpc.GenericRpcHandler:
        """What answers the calls at one of its addresses."""
        return rpc.handlers(self.servicer, POOL, LIMITS, LANES, from_gateway=from_gateway)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncGenerator[Self]:
        """Serves on both addresses, with options of the interceptor."""
        direct, gateway = self.handlers(), self.handlers(from_gateway=True)
        async with (
            serving(direct, self.metrics, **options) as self.channel,
            serving(gateway, self.metrics, from_gateway=True, **options) as self.gateway,
        ):
            yield self

    async def ask(self, name: str, request: Any, *, rest: bool) -> Answer:
        call = self.call(name, request, rest=rest)
        answer = Answer({}, [])
        async with asyncio.timeout(TIMEOUT_S):
            try:
                if METHODS[name].server_streaming:
                    async for reply in call:
                        answer.replies.append(reply)
                else:
                    answer.replies.append(await call)
            except aio.AioRpcError as error:
                answer.error = error
            answer.headers = dict(await call.initial_metadata())
        return answer

    async def ask_both(self, name: str, request: Any) -> tuple[Answer, Answer]:
        """The answers to a gRPC and to a REST caller."""
        native = await self.ask(name, request, rest=False)
        rest = await self.ask(name, request, rest=True)
        assert not any(getattr(reply, "http", None) for reply in native.replies)
        return native, rest


def as_body(request: Any) -> Any:
    """The same request as the gateway sends it for a REST caller: its JSON in `http`."""
    if getattr(request, "http", request) is not None:  # it has a body already, or takes none
        return request
    return with_body(type(request), json.dumps(to_json(request)).encode())


def with_body(kind: Any, body: bytes) -> Any:
    return kind(http=HttpBody(content_type="application/json", data=body))


def to_json(value: Any) -> Any:
    """A message as a REST caller writes it: absent fields are left out, enums are names."""
    match value:
        case Value():
            return plain(value)
        case betterproto2.Message():
            members = {item.name: getattr(value, item.name) for item in fields(value)}
            return {
                name: to_json(member)
                for name, member in members.items()
                if member is not None and member != []
            }
        case list():
            return [to_json(item) for item in value]
        case Enum():
            return value.name
    return value


PROMPT = "Once upon a time"


def generate_request(parameters: dict[str, Any] | None = None) -> pb.GenerateRequest:
    given = None if parameters is None else pb.GenerateParameters(**parameters)
    return pb.GenerateRequest(inputs=PROMPT, parameters=given)


def chat_request(**changes: Any) -> pb.ChatRequest:
    message = pb.Message(role="user", content=Value(string_value="hello"))
    return pb.ChatRequest(**({"messages": [message]} | changes))


def assert_same_status(
    native: Answer, rest: Answer, code: grpc.StatusCode, http: int, kind: str, text: str
) -> None:
    assert native.failure.code() is rest.failure.code() is code
    assert native.failure.details() == text.removeprefix(SHAPE)
    assert "x-http-status" not in trailers(native.failure)
    assert trailers(rest.failure)["x-http-status"] == str(http)
    body = json.loads(trailers(rest.failure)["x-error-body"])
    assert body == {"error": text, "error_type": kind}
    assert native.replies == rest.replies == []


INVALID = grpc.StatusCode.INVALID_ARGUMENT


def streamed(name: str, **parameters: Any) -> Any:
    if name == "Chat":
        return chat_request(stream=True, **parameters)
    if name == "Completions":
        return pb.CompletionsRequest(prompt=["x"], stream=True, **parameters)
    given = pb.GenerateParameters(**parameters)
    if name == "CompatGenerate":
        return pb.CompatGenerateRequest(inputs="x", parameters=given, stream=True)
    return pb.GenerateRequest(inputs="x", parameters=given)


STREAMS = ["GenerateStream", "CompatGenerate", "Chat", "Completions"]
