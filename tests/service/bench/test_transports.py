"""The server over REST and over gRPC: one result per token, and its failures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from service.bench.grpc_transport import GrpcTransport
from service.bench.rest_transport import RestTransport
from service.bench.transport import INCOMPLETE, Failure, RequestFailed
from service.client.target import parse_target
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb
from tests.service.bench.fakes import OVERLOADED, TASK


async def tokens_of(transport: RestTransport | GrpcTransport) -> int:
    try:
        return len([None async for _ in transport.stream(TASK)])
    finally:
        await transport.close()


def rest_transport(status: int, content: bytes) -> RestTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content)

    return RestTransport(parse_target("http://fake"), http=httpx.MockTransport(answer))


class TestRestTransport:
    async def test_yields_once_for_each_event(self) -> None:
        text = "a\u2028b\x85c"  # ends lines for str.splitlines, not for SSE
        last = json.dumps({"token": {}, "generated_text": text}, ensure_ascii=False)
        body = f':\n\ndata:{{"generated_text":null}}\n\ndata: {last}\n\n'.encode()
        assert await tokens_of(rest_transport(200, body)) == 2

    @pytest.mark.parametrize(
        ("status", "body", "failure"),
        [
            (429, b'{"error":"Model is overloaded","error_type":"overloaded"}', OVERLOADED),
            (
                200,
                b'data:{"error":"x","error_type":"generation"}\n\n',
                Failure("generation", "200", "x"),
            ),
            (
                502,
                b"<html>",
                Failure("http", "502", "the answer to /generate_stream has status 502"),
            ),
            (200, b'data:{"generated_text":null}\n\n', INCOMPLETE),
            (200, b"", INCOMPLETE),
        ],
    )
    async def test_failures(self, status: int, body: bytes, failure: Failure) -> None:
        with pytest.raises(RequestFailed) as caught:
            await tokens_of(rest_transport(status, body))
        assert caught.value.failure == failure

    async def test_tokens_in_another_form_are_a_failure(self) -> None:
        transport = rest_transport(200, b'{"tokens":[]}')
        with pytest.raises(RequestFailed, match="no list of tokens"):
            await transport.token_stops("x")
        await transport.close()


class FakeServicer:
    """A gRPC server whose stream has one token and then ends as `kind` says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def stream(self, raw: bytes, context: Any) -> AsyncIterator[bytes]:
        request = pb.GenerateRequest.parse(raw)
        assert request.parameters is not None
        assert (request.parameters.seed, request.parameters.max_new_tokens) == (7, 2)
        yield bytes(pb.GenerateStreamResponse(index=1, token=pb.Token(id=1, text="a")))
        if self.kind == "good":
            yield bytes(pb.GenerateStreamResponse(index=2, generated_text="ab"))
        if self.kind == "bad":
            detail = any_pb2.Any()
            detail.Pack(
                error_details_pb2.ErrorInfo(
                    reason="GENERATION", metadata={"error_type": "generation"}
                )
            )
            status = status_pb2.Status(details=[detail]).SerializeToString()
            trailers = (("grpc-status-details-bin", status),)
            await context.abort(grpc.StatusCode.ABORTED, "x", trailers)

    async def tokenize(self, raw: bytes, context: Any) -> bytes:
        return bytes(pb.TokenizeResponse(tokens=[pb.SimpleToken(), pb.SimpleToken(stop=5)]))

    async def metrics(self, raw: bytes, context: Any) -> bytes:
        return bytes(HttpBody(data=b"series 1\n"))


async def serving(kind: str) -> tuple[aio.Server, GrpcTransport]:
    servicer = FakeServicer(kind)
    server = aio.server()
    methods = {
        "GenerateStream": grpc.unary_stream_rpc_method_handler(servicer.stream),
        "Tokenize": grpc.unary_unary_rpc_method_handler(servicer.tokenize),
        "Metrics": grpc.unary_unary_rpc_method_handler(servicer.metrics),
    }
    name = "tokenwire.v1.TextGenerationService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, GrpcTransport(parse_target(f"grpc://127.0.0.1:{port}"))


class TestGrpcTransport:
    async def test_yields_once_for_each_message(self) -> None:
        server, transport = await serving("good")
        assert await transport.token_stops("hello") == [0, 5]
        assert await transport.metrics() == "series 1\n"
        assert await tokens_of(transport) == 2
        await server.stop(None)

    @pytest.mark.parametrize(
        ("kind", "failure"),
        [("bad", Failure("generation", "ABORTED", "x")), ("short", INCOMPLETE)],
    )
    async def test_failures(self, kind: str, failure: Failure) -> None:
        server, transport = await serving(kind)
        with pytest.raises(RequestFailed) as caught:
            await tokens_of(transport)
        assert caught.value.failure == failure
        await server.stop(None)
