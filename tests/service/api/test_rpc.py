"""The wire: every method is served, and bytes that are no message are refused."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import betterproto2
import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc import aio

from service.api import rpc
from service.api.call import Call
from service.codec import framing, requests
from service.codec.presenter import RestPresenter, TypedPresenter
from service.generation.parameters import Parameters, TextRequest
from service.pb.google.api import HttpBody
from service.pb.google.protobuf import Struct, Value
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.service.api.harness import REST
from tests.service.fakes import ADMIN_KEY, ADMINS, LANES, LIMITS, FakeContext, serving

POOL = rpc.load_pool()
METHODS = {method.name: method for method in POOL.FindServiceByName(SERVICE).methods}


class Servicer:
    """Sends empty replies, and records its requests and calls."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.calls: list[Call] = []
        self.num_closed = 0
        self.document: HttpBody | bytes = HttpBody()

    async def _one(self, reply: Any, request: Any, call: Call) -> Any:
        self.requests.append(request)
        self.calls.append(call)
        return reply

    async def generate(self, request: Any, call: Call) -> Any:
        return await self._one(pb.GenerateResponse(generated_text="x"), request, call)

    async def tokenize(self, request: Any, call: Call) -> Any:
        return await self._one(pb.TokenizeResponse(), request, call)

    async def info(self, request: Any, call: Call) -> Any:
        return await self._one(pb.InfoResponse(), request, call)

    async def health(self, request: Any, call: Call) -> Any:
        return await self._one(framing.http_reply("text/plain", b"ready made"), request, call)

    async def metrics(self, request: Any, call: Call) -> Any:
        return await self._one(self.document, request, call)

    open_api = docs = metrics

    async def get_load(self, request: Any, call: Call) -> Any:
        return await self._one(pb.GetLoadResponse(running=3), request, call)

    async def abort(self, request: Any, call: Call) -> Any:
        return await self._one(pb.AbortResponse(), request, call)

    async def load_adapter(self, request: Any, call: Call) -> Any:
        return await self._one(pb.LoadAdapterResponse(), request, call)

    async def unload_adapter(self, request: Any, call: Call) -> Any:
        return await self._one(pb.UnloadAdapterResponse(), request, call)

    async def list_adapters(self, request: Any, call: Call) -> Any:
        return await self._one(pb.ListAdaptersResponse(), request, call)

    async def chat_unary(self, request: Any, call: Call) -> Any:
        return await self._one(pb.ChatCompletion(), request, call)

    async def completions_unary(self, request: Any, call: Call) -> Any:
        return await self._one(pb.Completion(), request, call)

    async def list_models(self, request: Any, call: Call) -> Any:
        return await self._one(pb.ListModelsResponse(), request, call)

    async def get_model(self, request: Any, call: Call) -> Any:
        return await self._one(pb.GetModelResponse(), request, call)

    async def chat_tokenize(self, request: Any, call: Call) -> Any:
        return await self._one(pb.ChatTokenizeResponse(), request, call)

    def tokenize_stream(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.TokenizeResponse(), request, call)

    def chat_tokenize_stream(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.ChatTokenizeResponse(), request, call)

    async def _two(self, reply: Any, request: Any, call: Call) -> AsyncIterator[Any]:
        try:
            yield await self._one(reply, request, call)
            yield reply
        finally:
            self.num_closed += 1

    def generate_stream(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.GenerateStreamResponse(index=1), request, call)

    def compat_generate(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.CompatGenerateResponse(), request, call)

    def chat(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.ChatResponse(), request, call)

    def completions(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.CompletionsResponse(), request, call)

    def responses(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.ResponsesResponse(), request, call)

    def watch_load(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.GetLoadResponse(), request, call)

    def invocations(self, request: Any, call: Call) -> AsyncIterator[Any]:
        return self._two(pb.InvocationsResponse(), request, call)


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def channel(servicer: Servicer) -> AsyncGenerator[aio.Channel]:
    handlers = rpc.handlers(servicer, POOL, LIMITS, LANES, from_gateway=False)
    async with serving(handlers, authenticator=ADMINS) as channel:
        yield channel


@pytest.fixture
async def gateway(servicer: Servicer) -> AsyncGenerator[aio.Channel]:
    handlers = rpc.handlers(servicer, POOL, LIMITS, LANES, from_gateway=True)
    async with serving(handlers, from_gateway=True) as channel:
        yield channel


async def call(channel: aio.Channel, name: str, raw: bytes = b"", **options: Any) -> list[bytes]:
    path = f"/{SERVICE}/{name}"
    if METHODS[name].server_streaming:
        return [reply async for reply in channel.unary_stream(path)(raw, **options)]
    return [await channel.unary_unary(path)(raw, **options)]


async def refusal(channel: aio.Channel, name: str, raw: bytes) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as refused:
        await call(channel, name, raw)
    return refused.value


VALID = {
    "Generate": bytes(pb.GenerateRequest(inputs="")),
    "GenerateStream": bytes(pb.GenerateRequest(inputs="")),
    "CompatGenerate": bytes(pb.CompatGenerateRequest(inputs="")),
    "Invocations": bytes(pb.InvocationsRequest(inputs="")),
    "Tokenize": bytes(pb.TokenizeRequest(inputs="")),
    "Responses": bytes(pb.ResponsesRequest(input=Value(string_value=""))),
    "TokenizeStream": bytes(pb.TokenizeRequest(inputs="")),
    "GetModel": bytes(pb.GetModelRequest(id="a/b")),
    "LoadAdapter": bytes(pb.LoadAdapterRequest(lora_name="a", lora_path="b")),
    "UnloadAdapter": bytes(pb.UnloadAdapterRequest(lora_name="a")),
}


@pytest.mark.parametrize("name", METHODS)
async def test_every_method_is_served(channel: aio.Channel, servicer: Servicer, name: str) -> None:
    streams = METHODS[name].server_streaming
    key = [("authorization", f"Bearer {ADMIN_KEY}")]
    replies = await call(channel, name, VALID.get(name, b""), metadata=key)
    assert len(replies) == (2 if streams else 1)
    assert len(servicer.requests) == 1
    assert servicer.num_closed == streams


async def test_reply_bytes_are_sent_unchanged(channel: aio.Channel) -> None:
    (raw,) = await call(channel, "Health")
    assert pb.HealthResponse.parse(raw).http == HttpBody(
        content_type="text/plain", data=b"ready made"
    )


@pytest.mark.parametrize(("num_bytes", "expected"), [(32 * 1024, None), (33 * 1024, "yes")])
async def test_whole_replies_of_several_writes_may_be_held_until_their_end(
    channel: aio.Channel, servicer: Servicer, num_bytes: int, expected: str | None
) -> None:
    servicer.document = bytes(num_bytes)
    called = channel.unary_unary(f"/{SERVICE}/Metrics")(b"")
    assert await called == bytes(num_bytes)
    assert dict(await called.initial_metadata()).get("x-accel-buffering") == expected


def test_a_missing_method_fails_at_start_up() -> None:
    class Incomplete:
        generate = Servicer.generate

    with pytest.raises(AttributeError, match=r"generate_stream|compat_generate"):
        rpc.handlers(Incomplete(), POOL, LIMITS, LANES, from_gateway=False)


INPUTS = bytes(pb.GenerateRequest(inputs="hello"))


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(INPUTS[:-1], id="cut short"),
        pytest.param(b"\x0a\xff\xff\xff\xff\x0f", id="a length beyond the end"),
        pytest.param(b"\x0a\x02\xff\xfe", id="not UTF-8"),
        pytest.param(b"\x0a\x03\xed\xa0\x80", id="half a surrogate pair"),
        pytest.param(b"\xff" * 20, id="no tags"),
        pytest.param(b"\x00", id="field zero"),
        pytest.param(b"\x12\x02\x08", id="a broken inner message"),
        pytest.param(b"\x0b", id="a group without an end"),
    ],
)
async def test_broken_bytes_are_an_invalid_argument(
    channel: aio.Channel, servicer: Servicer, name: str, raw: bytes
) -> None:
    error = await refusal(channel, name, raw)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert servicer.requests == []


async def test_deep_nesting_is_an_invalid_argument(channel: aio.Channel) -> None:
    raw = b""
    for _ in range(5000):  # a list in a list in a list
        raw = _field(6, _field(1, raw))
    body = _field(2, _field(18, _field(2, raw)))
    error = await refusal(channel, "Generate", body)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return framing.sized(framing._varint(number << 3 | 2), content)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\x08\x05", id="a number for a text"),
        pytest.param(b"\x0d\x01\x02\x03\x04", id="four bytes for a text"),
        pytest.param(b"\x10\x05", id="a number for a message"),
    ],
)
async def test_a_field_of_the_wrong_type_counts_as_unknown(
    channel: aio.Channel, servicer: Servicer, raw: bytes
) -> None:
    error = await refusal(channel, "Generate", raw)
    assert error.details() == "missing field `inputs`"


async def test_a_parameter_of_the_wrong_type_counts_as_unknown(
    channel: aio.Channel, servicer: Servicer
) -> None:
    """`temperature` as a varint, followed by a valid `top_k`."""
    await call(channel, "Generate", INPUTS + _field(2, b"\x10\x01" + b"\x28\x07"))
    (request,) = servicer.requests
    assert request == TextRequest(inputs="hello", parameters=Parameters(top_k=7))


async def test_unknown_fields_are_ignored(channel: aio.Channel, servicer: Servicer) -> None:
    unknown = _field(900, b"from the future") + b"\x98\x38\x01"
    await call(channel, "Generate", unknown + INPUTS + _field(2, unknown + b"\x28\x07") + unknown)
    (request,) = servicer.requests
    assert request == TextRequest(inputs="hello", parameters=Parameters(top_k=7))


async def test_unknown_values_of_an_enum_are_kept(channel: aio.Channel, servicer: Servicer) -> None:
    """They are refused later, in validation; parsing must not fail."""
    grammar = _field(18, b"\x08\x63")
    await call(channel, "Generate", INPUTS + _field(2, grammar))
    (request,) = servicer.requests
    assert request.parameters.grammar.kind == ""


async def test_a_schema_keeps_the_order_of_its_keys(
    channel: aio.Channel, servicer: Servicer
) -> None:
    names = [f"key{number * 7 % 31}" for number in range(31)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    grammar = pb.Grammar(type=pb.GrammarType.json, value=Value.from_dict(schema))
    message = pb.GenerateRequest(inputs="x", parameters=pb.GenerateParameters(grammar=grammar))
    await call(channel, "Generate", bytes(message))
    found = servicer.requests[0].parameters.grammar
    assert found is not None
    assert list(found.value["properties"]) == names


@pytest.mark.xfail(strict=True, reason="the second of two partial messages replaces the first")
async def test_parts_of_a_message_are_merged(channel: aio.Channel, servicer: Servicer) -> None:
    """As protobuf specifies for a field that occurs twice."""
    parts = _field(2, b"\x28\x07") + _field(2, b"\x80\x01\x05")
    await call(channel, "Generate", INPUTS + parts)
    assert servicer.requests[0].parameters == Parameters(top_k=7, seed=5)


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(inputs="", parameters=pb.GenerateParameters()),
        pb.GenerateRequest(
            inputs="é😀", parameters=pb.GenerateParameters(seed=2**64 - 1, top_k=-1, stop=["", "a"])
        ),
    ],
)
async def test_a_message_arrives_as_it_was_sent(
    channel: aio.Channel, servicer: Servicer, message: betterproto2.Message
) -> None:
    await call(channel, "Generate", bytes(message))
    assert servicer.requests == [requests.text_request(message)]


BODY = bytes(pb.GenerateRequest(http=HttpBody(data=b'{"inputs": "hello"}')))


async def test_the_header_of_the_transcoder_marks_a_rest_call(
    gateway: aio.Channel, servicer: Servicer
) -> None:
    await call(gateway, "Generate", INPUTS)
    await call(gateway, "Generate", BODY, metadata=REST)
    native, rest = servicer.calls
    assert isinstance(native.presenter, TypedPresenter)
    assert isinstance(rest.presenter, RestPresenter)
    assert (native.is_rest, rest.is_rest) == (False, True)
    assert (
        servicer.requests
        == [TextRequest(inputs="hello", parameters=Parameters(do_sample=True))] * 2
    )


async def test_that_header_means_nothing_from_a_grpc_caller(
    channel: aio.Channel, servicer: Servicer
) -> None:
    await call(channel, "Generate", INPUTS, metadata=REST)
    assert [made.is_rest for made in servicer.calls] == [False]


async def test_a_body_is_refused_from_a_grpc_caller(
    channel: aio.Channel, gateway: aio.Channel
) -> None:
    for each in (channel, gateway):
        error = await refusal(each, "Generate", BODY)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "`http` is for the gateway: use the other fields"


async def test_a_large_body_is_read_as_well(gateway: aio.Channel, servicer: Servicer) -> None:
    text = "é" * 500_000
    body = json.dumps({"inputs": text}, ensure_ascii=False).encode()
    await call(
        gateway, "Tokenize", bytes(pb.TokenizeRequest(http=HttpBody(data=body))), metadata=REST
    )
    assert servicer.requests == [text]


async def test_headers_are_sent_as_initial_metadata() -> None:
    context = FakeContext()
    await Call(context, from_gateway=False).send_headers({"x-a": "1"})
    assert context.headers == [{"x-a": "1"}]


@pytest.mark.parametrize(("metadata", "num_before"), [(REST, 0), ((), 1)], ids=["rest", "grpc"])
async def test_headers_of_a_stream_go_with_its_first_message_over_rest(
    metadata: tuple[tuple[str, str], ...], num_before: int
) -> None:
    """Before that a call can be made again elsewhere, since its caller has seen nothing."""
    context = FakeContext(metadata)
    call = Call(context, from_gateway=True)
    await call.begin_stream({"x-a": "1"})
    assert len(context.headers) == num_before
    for _ in range(2):
        await call.write(b"")
    await call.aclose()
    assert context.headers == [{"x-a": "1"}]


@pytest.mark.parametrize(("from_gateway", "known"), [(True, "one"), (False, "")])
async def test_the_gateway_alone_says_which_call_it_is(from_gateway: bool, known: str) -> None:
    call = Call(FakeContext((("x-tokenwire-call", "one"),)), from_gateway=from_gateway)
    assert call.gateway_id == known


def test_the_descriptor_pool_has_our_files() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    POOL.FindServiceByName(SERVICE).file.CopyToProto(file)
    assert file.name == "tokenwire/v1/text_generation.proto"
    assert POOL.FindMessageTypeByName("google.api.HttpBody").full_name == "google.api.HttpBody"


def test_structs_are_generated_messages() -> None:
    assert bytes(Struct(fields={"a": Value(bool_value=True)})) == b"\n\x07\n\x01a\x12\x02 \x01"


@pytest.mark.parametrize(
    ("method", "field", "message"),
    [
        ("Chat", "tools", lambda big: pb.ChatRequest(tools=[pb.Tool(function=big)] * 3)),
        (
            "Chat",
            "response_format",
            lambda big: pb.ChatRequest(response_format=pb.ResponseFormat(value=big.parameters)),
        ),
        (
            "Generate",
            "parameters.grammar",
            lambda big: pb.GenerateRequest(
                parameters=pb.GenerateParameters(grammar=pb.Grammar(value=big.parameters))
            ),
        ),
    ],
)
async def test_a_huge_schema_is_refused_before_it_is_parsed(
    channel: aio.Channel, servicer: Servicer, method: str, field: str, message: Any
) -> None:
    huge = Value(string_value="x" * 300_000)
    error = await refusal(channel, method, bytes(message(pb.FunctionDefinition(parameters=huge))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"Input validation error: `{field}` must have at most 262144")
    assert not servicer.requests
