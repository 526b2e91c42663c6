"""gRPC on the same port: passed on unchanged, with its own errors, and gRPC-Web for browsers."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from service.routes import SERVICE
from tests.envoy.fake_service import DEADLINE
from tests.envoy.gateway import Gateway, StartGateway


def test_unary_call_is_typed_both_ways(gateway: Gateway) -> None:
    reply = gateway.messages.new("GenerateResponse", generated_text="caf\u00e9 <b>")

    async def unary(_request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-compute-type", "cpu"),))
        context.set_trailing_metadata((("x-total-time", "12"),))
        return reply

    gateway.service.behave("Generate", unary)
    request = gateway.messages.new("GenerateRequest", inputs="a")
    with gateway.channel() as channel:
        answer, call = gateway.stub(channel, "Generate").with_call(request, timeout=DEADLINE)
    assert answer == reply
    assert gateway.service.calls[-1].request == request
    assert dict(call.initial_metadata())["x-compute-type"] == "cpu"
    assert dict(call.trailing_metadata())["x-total-time"] == "12"


def test_whole_reply_may_be_large(gateway: Gateway) -> None:
    """Envoy holds it until all of it is here, and may hold less of other things."""
    reply = gateway.messages.new("GenerateResponse", generated_text="x" * (12 << 20))

    async def unary(_request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-total-time", "1"),))
        return reply

    gateway.service.behave("Generate", unary)
    request = gateway.messages.new("GenerateRequest", inputs="a")
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(gateway.target, options=options) as channel:
        assert gateway.stub(channel, "Generate")(request, timeout=DEADLINE) == reply


def test_what_tells_that_a_reply_is_whole_is_not_passed_on(gateway: Gateway) -> None:
    async def unary(_request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-accel-buffering", "yes"),))
        return gateway.messages.new("TokenizeResponse")

    gateway.service.behave("Tokenize", unary)
    with gateway.channel() as channel:
        request = gateway.messages.new("TokenizeRequest", inputs="a")
        _, call = gateway.stub(channel, "Tokenize").with_call(request, timeout=DEADLINE)
    assert "x-accel-buffering" not in dict(call.initial_metadata())
    assert "outside of proper scope" not in (gateway.directory / "envoy.log").read_text()


def test_each_message_of_a_stream_arrives_before_the_next_is_made(gateway: Gateway) -> None:
    gates = [gateway.service.gate() for _ in range(3)]

    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for index, gate in enumerate(gates):
            yield gateway.messages.new("GenerateStreamResponse", index=index)
            await gate.wait()

    gateway.service.behave("GenerateStream", stream)
    with gateway.channel() as channel:
        request = gateway.messages.new("GenerateRequest", inputs="a")
        messages = gateway.stub(channel, "GenerateStream")(request, timeout=DEADLINE)
        for index, gate in enumerate(gates):
            assert next(messages).index == index
            gate.open()
        assert next(messages, None) is None


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_error_keeps_code_text_and_details(gateway: Gateway, method: str) -> None:
    gateway.service.fail(
        method,
        grpc.StatusCode.INVALID_ARGUMENT,
        "`top_k` must be > 0: \u00e9",
        grpc_status_details_bin=b"\x08\x03",
        x_http_status="422",
        x_error_body='{"error":"a","error_type":"validation"}',
        retry_after="3",
    )
    with gateway.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        answer = gateway.stub(channel, method)(
            gateway.messages.new("GenerateRequest"), timeout=DEADLINE
        )
        list(answer)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "`top_k` must be > 0: \u00e9"
    trailing = dict(error.trailing_metadata())
    assert trailing["grpc-status-details-bin"] == b"\x08\x03"
    assert trailing["retry-after"] == "3"


def test_error_after_messages_keeps_its_code(gateway: Gateway) -> None:
    async def stream(_request: Any, context: Any) -> AsyncIterator[Any]:
        yield gateway.messages.new("GenerateStreamResponse", index=1)
        await context.abort(grpc.StatusCode.ABORTED, "the row failed")

    gateway.service.behave("GenerateStream", stream)
    with gateway.channel() as channel:
        request = gateway.messages.new("GenerateRequest", inputs="a")
        messages = gateway.stub(channel, "GenerateStream")(request, timeout=DEADLINE)
        assert next(messages).index == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(messages)
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "the row failed")


@pytest.mark.parametrize("leave", ["deadline", "cancel"])
def test_end_of_a_call_ends_the_handler(gateway: Gateway, leave: str) -> None:
    started, ended = threading.Event(), threading.Event()
    gate = gateway.service.gate()

    async def unary(_request: Any, _context: Any) -> Any:
        started.set()
        try:
            await gate.wait()
        finally:
            ended.set()

    gateway.service.behave("Generate", unary)
    with gateway.channel() as channel:
        grpc.channel_ready_future(channel).result(DEADLINE)
        call = gateway.stub(channel, "Generate").future
        request = gateway.messages.new("GenerateRequest")
        if leave == "cancel":
            future = call(request, timeout=DEADLINE)
            assert started.wait(DEADLINE)
            future.cancel()
        else:
            # On a busy machine a short deadline may expire before the handler has started.
            for timeout in (0.5, 5.0, DEADLINE):
                error = call(request, timeout=timeout).exception()
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if started.is_set():
                    break
            assert started.is_set()
        assert ended.wait(DEADLINE)


def test_message_above_the_rest_limit_is_passed_on(gateway: Gateway) -> None:
    request = gateway.messages.new("TokenizeRequest", inputs="x" * 3_000_000)
    with gateway.channel() as channel:
        gateway.stub(channel, "Tokenize")(request, timeout=DEADLINE)
    assert gateway.service.calls[-1].request == request


def test_message_above_the_service_limit_is_resource_exhausted(gateway: Gateway) -> None:
    request = gateway.messages.new("TokenizeRequest", inputs="x" * (9 << 20))
    with gateway.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        gateway.stub(channel, "Tokenize")(request, timeout=DEADLINE)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_grpc_caller_cannot_forge_the_headers_of_rest(gateway: Gateway) -> None:
    metadata = (("x-envoy-original-path", "/generate"), ("x-request-id", "mine"))
    with gateway.channel() as channel:
        request = gateway.messages.new("GenerateRequest")
        gateway.stub(channel, "Generate")(request, metadata=metadata, timeout=DEADLINE)
    seen = gateway.service.calls[-1].metadata
    assert "x-envoy-original-path" not in seen
    assert seen["x-request-id"] == "mine"


def test_health_service_answers(gateway: Gateway) -> None:
    with gateway.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=DEADLINE)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(gateway: Gateway) -> None:
    with gateway.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        file = database.FindFileContainingSymbol(SERVICE)
    assert "Generate" in [method.name for method in file.service[0].method]


@pytest.mark.parametrize("path", ["/other.Service/Method", "/generate", f"/{SERVICE}/Nothing"])
def test_unknown_method_is_unimplemented(gateway: Gateway, path: str) -> None:
    with gateway.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"", timeout=DEADLINE)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reply_of_envoy_has_plain_words(gateway: Gateway) -> None:
    with gateway.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/other.Service/Method")(b"", timeout=DEADLINE)
    error: Any = caught.value
    assert error.details() == "unknown service"


def test_unreachable_service_is_unavailable_in_plain_words(start_gateway: StartGateway) -> None:
    with socket.socket() as reserved:  # bound but not listening: connections are refused
        reserved.bind(("127.0.0.1", 0))
        with (
            start_gateway(upstream_port=reserved.getsockname()[1]) as orphan,
            orphan.channel() as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            request = orphan.messages.new("GenerateRequest")
            orphan.stub(channel, "Generate")(request, timeout=DEADLINE)
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "unhealthy")


def test_replies_have_the_id_of_the_caller(gateway: Gateway) -> None:
    request = gateway.messages.new("GenerateRequest")
    mine = (("x-request-id", "mine"),)
    with gateway.channel() as channel:
        call = gateway.stub(channel, "Generate")
        _, answered = call.with_call(request, metadata=mine, timeout=DEADLINE)
        assert dict(answered.initial_metadata())["x-request-id"] == "mine"
        _, answered = call.with_call(request, timeout=DEADLINE)
        made = gateway.service.calls[-1].metadata["x-request-id"]
        assert dict(answered.initial_metadata())["x-request-id"] == made
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/other.Service/Method")(b"", metadata=mine, timeout=DEADLINE)
    error: Any = caught.value
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"


def frames(body: bytes) -> list[tuple[int, bytes]]:
    """Splits a gRPC-Web body into (flags, payload)."""
    found = []
    while body:
        flags, size = struct.unpack(">BI", body[:5])
        found.append((flags, body[5 : 5 + size]))
        body = body[5 + size :]
    return found


@pytest.mark.parametrize("text", [False, True])
def test_grpc_web_carries_messages_and_trailers(gateway: Gateway, text: bool) -> None:
    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for index in (1, 2):
            yield gateway.messages.new("GenerateStreamResponse", index=index)

    gateway.service.behave("GenerateStream", stream)
    request = gateway.messages.new("GenerateRequest", inputs="a").SerializeToString()
    content = struct.pack(">BI", 0, len(request)) + request
    kind = f"application/grpc-web{'-text' if text else ''}"
    reply = gateway.client.post(
        f"/{SERVICE}/GenerateStream",
        content=base64.b64encode(content) if text else content,
        headers={"content-type": kind, "accept": kind, "x-grpc-web": "1", "origin": "http://a"},
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith(kind)
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "grpc-status" in reply.headers["access-control-expose-headers"]
    body = reply.content
    if text:  # several parts, each encoded by itself with its own padding
        body = b"".join(base64.b64decode(part + b"==") for part in body.split(b"=") if part)
    *messages, (flags, trailers) = frames(body)
    parse = gateway.messages.parser(
        gateway.messages.service.methods_by_name["GenerateStream"].output_type
    )
    assert [parse(payload).index for _, payload in messages] == [1, 2]  # type: ignore[attr-defined]
    assert flags == 0x80
    assert b"grpc-status:0" in trailers.replace(b" ", b"")


def test_grpc_web_error_keeps_its_code(gateway: Gateway) -> None:
    gateway.service.fail("Generate", grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    reply = gateway.client.post(
        f"/{SERVICE}/Generate",
        content=struct.pack(">BI", 0, 0),
        headers={"content-type": "application/grpc-web+proto"},
    )
    assert reply.status_code == 200
    assert (reply.headers["grpc-status"], reply.headers["grpc-message"]) == ("8", "full")


def test_reply_of_envoy_to_grpc_web_has_plain_words(gateway: Gateway) -> None:
    reply = gateway.client.post(
        "/other.Service/Method",
        content=struct.pack(">BI", 0, 0),
        headers={"content-type": "application/grpc-web+proto"},
    )
    assert (reply.headers["grpc-status"], reply.headers["grpc-message"]) == (
        "12",
        "unknown service",
    )
