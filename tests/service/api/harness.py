"""The whole service over a scripted engine, and the calls that tests make to it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from service.api import rpc
from service.api.servicer import TextGenerationServicer
from service.generation.admission import Admission
from service.generation.generator import Generator
from service.generation.metrics import Metrics
from service.generation.pipeline import Pipeline
from service.generation.validation import Validator
from service.pb.google.api import HttpBody
from service.pb.google.protobuf import Value
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.service.fakes import (
    LIMITS,
    NO_GRAMMARS,
    SERVER,
    TIMEOUT_S,
    FakeEngineClient,
    Script,
    demo_tokenizer,
    speaking,
    trailers,
)

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

    def __init__(self) -> None:
        self.client = FakeEngineClient(speaking(TEXT))
        self.admission = Admission(LIMITS.max_concurrent_requests)
        self.metrics = Metrics(LIMITS)
        pipeline = Pipeline(
            self.admission,
            Validator(LIMITS, demo_tokenizer(), NO_GRAMMARS),
            Generator(self.client, demo_tokenizer()),  # type: ignore[arg-type]
            self.metrics,
        )
        self.servicer = TextGenerationServicer(
            pipeline,
            demo_tokenizer(),
            self.client,  # type: ignore[arg-type]
            SERVER,
            self.metrics,
        )
        self.channel: aio.Channel

    def use_script(self, engine_script: Script) -> None:
        self.client.script = engine_script

    async def ask(self, name: str, request: Any, *, rest: bool) -> Answer:
        path, kind = f"/{SERVICE}/{name}", REPLIES[name]
        make = self.channel.unary_unary
        if METHODS[name].server_streaming:
            make = self.channel.unary_stream
        call = make(path, bytes, kind.parse)(request, metadata=REST if rest else None)
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
    for answer in (native, rest):
        assert answer.failure.code() is code
        assert answer.failure.details() == text
        assert trailers(answer.failure)["x-http-status"] == str(http)
        body = json.loads(trailers(answer.failure)["x-error-body"])
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
