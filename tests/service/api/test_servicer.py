"""The whole service, asked twice: by a gRPC caller and by a REST caller. They hear the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
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
from tests.service.codec.test_convert import assert_agree
from tests.service.fakes import (
    LIMITS,
    NO_GRAMMARS,
    SERVER,
    TIMEOUT_S,
    FakeEngineClient,
    Script,
    demo_ids,
    demo_tokenizer,
    eventually,
    script,
    serving,
    speaking,
    step,
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
    """All that a caller hears."""

    headers: dict[str, Any]
    replies: list[Any]
    error: aio.AioRpcError | None = None

    @property
    def body(self) -> bytes:
        """What the gateway passes on to a REST caller."""
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
    """A service over an engine that plays a script."""

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

    def plays(self, play: Script) -> None:
        self.client.script = play

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


@pytest.fixture
async def service() -> AsyncGenerator[Service]:
    service = Service()
    async with serving(rpc.handlers(service.servicer, POOL), service.metrics) as channel:
        service.channel = channel
        yield service
        assert service.client.num_open == 0
        assert service.admission.num_active == 0


PROMPT = "Once upon a time"
GREEDY = {
    "plain": {},
    "details": {"details": True},
    "everything": {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 5},
    "echo": {"return_full_text": True, "details": True},
    "short": {"max_new_tokens": 2, "details": True},
    "stop": {"stop": ["fox."], "details": True},
    "truncated": {"truncate": 3, "details": True, "decoder_input_details": True},
    "sampled": {"temperature": 0.5, "seed": 2**64 - 1, "details": True},
}


def generate_request(parameters: dict[str, Any] | None = None) -> pb.GenerateRequest:
    given = None if parameters is None else pb.GenerateParameters(**parameters)
    return pb.GenerateRequest(inputs=PROMPT, parameters=given)


def tokens_of(message: Any) -> list[int]:
    return [token.id for token in message.details.tokens]


@pytest.mark.parametrize("parameters", GREEDY.values(), ids=GREEDY.keys())
async def test_generate_says_the_same_to_both(service: Service, parameters: dict[str, Any]) -> None:
    native, rest = await service.ask_both("Generate", generate_request(parameters))
    assert_agree(native.replies[0], rest.json)


async def test_generate_gives_the_text(service: Service) -> None:
    native, rest = await service.ask_both("Generate", generate_request({"details": True}))
    assert rest.json["generated_text"] == TEXT
    (reply,) = native.replies
    assert tokens_of(reply)[:-1] == demo_ids(TEXT)
    assert reply.details.tokens[-1].special
    assert reply.details.finish_reason is pb.FinishReason.EOS_TOKEN
    assert rest.json["details"]["finish_reason"] == "eos_token"
    assert rest.json["details"]["seed"] is None


async def test_absent_parameters_mean_sampling(service: Service) -> None:
    await service.ask_both("Generate", generate_request())
    await service.ask_both("Generate", generate_request({}))
    assert [item.sampling.do_sample for item in service.client.requests] == [
        True,
        True,
        False,
        False,
    ]


async def test_a_watermark_is_asked_of_the_engine(service: Service) -> None:
    await service.ask_both("Generate", generate_request({"watermark": True}))
    await service.ask_both("Generate", generate_request({}))
    asked = [item.sampling.watermark for item in service.client.requests]
    assert asked == [True, True, False, False]


async def test_best_of_says_the_same_to_both(service: Service) -> None:
    request = generate_request({"best_of": 2, "do_sample": True, "details": True})
    for answer in await service.ask_both("Generate", request):
        body = answer.replies[0] if answer.replies[0].http is None else answer.json
        sequences = (
            body["details"]["best_of_sequences"]
            if isinstance(body, dict)
            else body.details.best_of_sequences
        )
        assert len(sequences) == 1


TIMES = ("total-time", "validation-time", "queue-time", "inference-time")


async def test_a_reply_has_tgi_s_headers(service: Service) -> None:
    for answer in await service.ask_both("Generate", generate_request({"max_new_tokens": 2})):
        headers = answer.headers
        assert headers["x-compute-type"] == "1-cpu"
        assert headers["x-compute-characters"] == str(len(PROMPT))
        assert headers["x-generated-tokens"] == "2"
        assert headers["x-prompt-tokens"] == str(len(await demo_tokenizer().encode(PROMPT)))
        assert headers["x-time-per-token"].isdigit()
        assert float(headers["x-compute-time"]) >= 0
        assert all(float(headers[f"x-{name}"]) >= 0 for name in TIMES)


@pytest.mark.parametrize("parameters", [{}, {"details": True, "top_n_tokens": 2}], ids=str)
async def test_a_stream_says_the_same_to_both(service: Service, parameters: dict[str, Any]) -> None:
    native, rest = await service.ask_both("GenerateStream", generate_request(parameters))
    assert len(native.replies) == len(rest.events) == len(demo_ids(TEXT)) + 1
    for reply, event in zip(native.replies, rest.events, strict=True):
        assert_agree(reply, event)
    texts = [event["token"]["text"] for event in rest.events if not event["token"]["special"]]
    assert "".join(texts) == rest.events[-1]["generated_text"] == TEXT
    assert [event["index"] for event in rest.events] == list(range(1, len(rest.events) + 1))


async def test_a_stream_has_tgi_s_headers(service: Service) -> None:
    for answer in await service.ask_both("GenerateStream", generate_request({})):
        assert answer.headers["x-compute-type"] == "1-cpu"
        assert answer.headers["x-compute-characters"] == str(len(PROMPT))
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["cache-control"] == "no-cache"
        assert "x-total-time" not in answer.headers


async def test_the_root_path_answers_with_a_list_and_the_prompt(service: Service) -> None:
    native, rest = await service.ask_both("CompatGenerate", pb.CompatGenerateRequest(inputs=PROMPT))
    assert rest.json == [{"generated_text": PROMPT + TEXT}]
    assert native.replies[0].response.generated_text == PROMPT + TEXT


async def test_the_root_path_echoes_unless_told_not_to(service: Service) -> None:
    parameters = pb.GenerateParameters(return_full_text=False)
    request = pb.CompatGenerateRequest(inputs=PROMPT, parameters=parameters)
    _, rest = await service.ask_both("CompatGenerate", request)
    assert rest.json == [{"generated_text": TEXT}]


async def test_the_root_path_streams(service: Service) -> None:
    request = pb.CompatGenerateRequest(inputs=PROMPT, stream=True)
    native, rest = await service.ask_both("CompatGenerate", request)
    for reply, event in zip(native.replies, rest.events, strict=True):
        assert_agree(reply.event, event)
    assert rest.events[-1]["generated_text"] == PROMPT + TEXT


def chat_request(**changes: Any) -> pb.ChatRequest:
    message = pb.Message(role="user", content=Value(string_value="hello"))
    return pb.ChatRequest(**({"messages": [message]} | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}], ids=str
)
async def test_a_conversation_says_the_same_to_both(
    service: Service, changes: dict[str, Any]
) -> None:
    native, rest = await service.ask_both("Chat", chat_request(**changes))
    (reply,) = native.replies
    reply.completion.created = rest.json["created"]
    assert_agree(reply.completion, rest.json)
    assert rest.headers["x-compute-type"] == "1-cpu"
    if not changes:
        assert rest.json["choices"][0]["message"]["content"] == TEXT
        assert rest.json["usage"]["completion_tokens"] == len(demo_ids(TEXT)) + 1


async def test_a_streamed_conversation_says_the_same_to_both(service: Service) -> None:
    request = chat_request(stream=True, logprobs=True, top_logprobs=1)
    native, rest = await service.ask_both("Chat", request)
    *events, end = rest.events
    assert end == "[DONE]"
    for reply, event in zip(native.replies, events, strict=True):
        reply.chunk.created = event["created"]
        assert_agree(reply.chunk, event)
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == TEXT
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["eos_token"]


async def test_completions_say_the_same_to_both(service: Service) -> None:
    request = pb.CompletionsRequest(prompt=["one", "one two"], max_tokens=3, temperature=0.0)
    native, rest = await service.ask_both("Completions", request)
    (reply,) = native.replies
    reply.completion.created = rest.json["created"]
    assert_agree(reply.completion, rest.json)
    assert [choice["index"] for choice in rest.json["choices"]] == [0, 1]
    assert rest.json["usage"]["completion_tokens"] == 6
    assert rest.headers["x-generated-tokens"] == "6"
    assert "x-compute-time" not in rest.headers


async def test_streamed_completions_say_the_same_to_both(service: Service) -> None:
    request = pb.CompletionsRequest(prompt=["one", "one two"], max_tokens=3, stream=True)
    native, rest = await service.ask_both("Completions", request)
    *events, end = rest.events
    assert end == "[DONE]"
    for reply, event in zip(native.replies, events, strict=True):
        reply.completion.created = event["created"]
        assert_agree(reply.completion, event)
    assert [event["choices"][0]["index"] for event in events] == [0, 1, 0, 1, 0, 1]


async def test_tokens_say_the_same_to_both(service: Service) -> None:
    text = "Grüße 😀"
    native, rest = await service.ask_both("Tokenize", pb.TokenizeRequest(inputs=text))
    assert_agree(native.replies[0].tokens, rest.json)
    for token in rest.json:
        assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
    assert [token["id"] for token in rest.json if token["text"]] == demo_ids(text)


async def test_an_empty_text_may_be_tokenised(service: Service) -> None:
    native, rest = await service.ask_both("Tokenize", pb.TokenizeRequest(inputs=""))
    assert all(token["text"] == "" for token in rest.json)
    assert len(native.replies[0].tokens) == len(rest.json)


async def test_the_info_says_the_same_to_both(service: Service) -> None:
    native, rest = await service.ask_both("Info", pb.InfoRequest())
    assert_agree(native.replies[0], rest.json)


async def test_health_says_the_same_to_both(service: Service) -> None:
    _, rest = await service.ask_both("Health", pb.HealthRequest())
    assert (rest.body, rest.error) == (b"", None)
    service.client.is_healthy = False
    native, rest = await service.ask_both("Health", pb.HealthRequest())
    assert_same_status(native, rest, grpc.StatusCode.UNAVAILABLE, 503, "healthcheck", "unhealthy")


async def test_metrics_say_the_same_to_both(service: Service) -> None:
    await service.ask_both("Generate", generate_request({}))
    for answer in await service.ask_both("Metrics", pb.MetricsRequest()):
        assert answer.replies[0].content_type.startswith("text/plain; version=0.0.4")
        assert b"\ntgi_request_success 2.0\n" in answer.replies[0].data


# Errors.


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
TOP_P = "Input validation error: `top_p` must be > 0.0 and < 1.0"
MISSING = "Failed to deserialize the JSON body into the target type: missing field `{}`"
SUFFIX = "Suffix is not supported and can be achieved by preprocessing the prompt."
BATCH = "Number of prompts exceeds the maximum allowed batch size of 4"
UNKNOWN_ROLE = pb.Message(role="nobody", content=Value(string_value="x"))


@pytest.mark.parametrize(
    ("name", "request_", "kind", "text"),
    [
        ("Generate", generate_request({"top_p": 1.0}), "validation", TOP_P),
        (
            "CompatGenerate",
            pb.CompatGenerateRequest(inputs="x", parameters=pb.GenerateParameters(top_p=1.0)),
            "validation",
            TOP_P,
        ),
        ("Chat", chat_request(top_p=1.0), "validation", TOP_P),
        ("Completions", pb.CompletionsRequest(prompt=["x"], top_p=1.0), "validation", TOP_P),
        ("Generate", pb.GenerateRequest(), "validation", MISSING.format("inputs")),
        ("GenerateStream", pb.GenerateRequest(), "validation", MISSING.format("inputs")),
        ("CompatGenerate", pb.CompatGenerateRequest(), "validation", MISSING.format("inputs")),
        ("Tokenize", pb.TokenizeRequest(), "validation", MISSING.format("inputs")),
        ("Chat", pb.ChatRequest(), "validation", MISSING.format("messages")),
        ("Completions", pb.CompletionsRequest(), "validation", MISSING.format("prompt")),
        (
            "Completions",
            pb.CompletionsRequest(prompt=["x"], suffix="", stream=True),
            "suffix not supported",
            SUFFIX,
        ),
        (
            "Completions",
            pb.CompletionsRequest(prompt=["x"] * 5, stream=True),
            "batch size exceeded",
            BATCH,
        ),
        (
            "Chat",
            chat_request(n=2),
            "validation",
            "Input validation error: `n` must be 1. Given: 2",
        ),
        (
            "Chat",
            chat_request(presence_penalty=-2.0),
            "validation",
            "Input validation error: `repetition_penalty` must be strictly positive",
        ),
        (
            "Chat",
            pb.ChatRequest(messages=[UNKNOWN_ROLE], stream=True),
            "template_error",
            "Template error: syntax error: Unknown message role: nobody",
        ),
    ],
    ids=str,
)
async def test_a_refusal_has_the_same_status_for_both(
    service: Service, name: str, request_: Any, kind: str, text: str
) -> None:
    native, rest = await service.ask_both(name, request_)
    assert_same_status(native, rest, INVALID, 422, kind, text)
    assert service.client.requests == []


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
ENDS = {"Chat": ["[DONE]"], "Completions": ["[DONE]"]}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_s_refusal_is_an_event_for_rest_and_a_status_for_grpc(
    service: Service, name: str
) -> None:
    native, rest = await service.ask_both(name, streamed(name, top_p=1.0))
    assert native.failure.code() is INVALID
    assert native.failure.details() == TOP_P
    assert rest.error is None
    assert rest.events == [{"error": TOP_P, "error_type": "validation"}, *ENDS.get(name, [])]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_s_failure_is_an_event_for_rest_and_a_status_for_grpc(
    service: Service, name: str
) -> None:
    service.plays(script(step(demo_ids("x")[0]), step(error="bad luck")))
    native, rest = await service.ask_both(name, streamed(name))
    text = "Request failed during generation: Server error: bad luck"
    assert native.failure.code() is grpc.StatusCode.ABORTED
    assert native.failure.details() == text
    assert len(native.replies) == 1
    assert rest.error is None
    assert rest.events[1:] == [{"error": text, "error_type": "generation"}, *ENDS.get(name, [])]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_full_server_s_stream(service: Service, name: str) -> None:
    with service.admission.permit(LIMITS.max_concurrent_requests):
        native, rest = await service.ask_both(name, streamed(name))
    assert native.failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    failure = {"error": "Model is overloaded", "error_type": "overloaded"}
    assert rest.events == [failure, *ENDS.get(name, [])]


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("Generate", generate_request({"top_p": 1.0})),
        ("CompatGenerate", pb.CompatGenerateRequest(inputs="x")),
        ("Chat", chat_request()),
        ("Completions", pb.CompletionsRequest(prompt=["a", "b"])),
    ],
    ids=["Generate", "CompatGenerate", "Chat", "Completions"],
)
async def test_a_full_server(service: Service, name: str, request_: Any) -> None:
    with service.admission.permit(LIMITS.max_concurrent_requests):
        native, rest = await service.ask_both(name, request_)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_same_status(native, rest, code, 429, "overloaded", "Model is overloaded")


@pytest.mark.parametrize("name", ["Generate", "Chat", "Completions"])
async def test_a_failure_without_a_stream_is_a_424(service: Service, name: str) -> None:
    service.plays(script(step(error="bad luck")))
    request = {
        "Generate": generate_request({}),
        "Chat": chat_request(),
        "Completions": pb.CompletionsRequest(prompt=["a", "b"]),
    }[name]
    native, rest = await service.ask_both(name, request)
    text = "Request failed during generation: Server error: bad luck"
    assert_same_status(native, rest, grpc.StatusCode.ABORTED, 424, "generation", text)


async def test_one_prompt_may_fail_and_the_other_streams_on(service: Service) -> None:
    plays = [script(step(error="bad luck")), speaking(TEXT)]
    turns = iter(plays)
    service.plays(lambda request: next(turns)(request))
    request = pb.CompletionsRequest(prompt=["a", "b"], stream=True, max_tokens=2)
    rest = await service.ask("Completions", request, rest=True)
    first, second, third, end = rest.events
    assert first["error_type"] == "generation"
    assert [event["choices"][0]["index"] for event in (second, third)] == [1, 1]
    assert end == "[DONE]"


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("rest", [False, True], ids=["grpc", "rest"])
async def test_who_leaves_frees_the_engine(service: Service, name: str, rest: bool) -> None:
    service.plays(script(step(demo_ids("x")[0]), asyncio.Event()))
    ask = service.channel.unary_stream(f"/{SERVICE}/{name}", bytes, REPLIES[name].parse)
    call = ask(streamed(name), metadata=REST if rest else None)
    async with asyncio.timeout(TIMEOUT_S):
        await call.read()
    assert service.client.num_open == 1
    call.cancel()
    await eventually(lambda: service.client.num_open == 0 and service.admission.num_active == 0)
    assert service.client.num_aborted == 1


async def test_a_deadline_frees_the_engine(service: Service) -> None:
    service.plays(script(asyncio.Event()))
    call = service.channel.unary_unary(f"/{SERVICE}/Generate", bytes)
    with pytest.raises(aio.AioRpcError) as failed:
        await call(generate_request({}), timeout=0.2)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: service.client.num_open == 0 and service.admission.num_active == 0)


async def test_a_long_role_is_still_an_invalid_argument(service: Service) -> None:
    message = pb.Message(role="r" * 100_000, content=Value(string_value="x"))
    answer = await service.ask("Chat", pb.ChatRequest(messages=[message]), rest=False)
    assert answer.failure.code() is INVALID


async def test_content_of_no_kind_is_an_invalid_argument(service: Service) -> None:
    message = pb.Message(role="user", content=Value())
    answer = await service.ask("Chat", pb.ChatRequest(messages=[message]), rest=False)
    assert answer.failure.code() is INVALID
