"""The server over gRPC, on its own port or through the gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from ..client.credentials import Credentials
from ..client.target import Target
from ..pb.google.api import HttpBody
from ..pb.tokenwire import v1 as pb
from ..routes import SERVICE
from .transport import (
    INCOMPLETE,
    TEMPERATURE,
    UNARY_TIMEOUT_S,
    Failure,
    RequestFailed,
    Task,
)

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),  # the tokens of a long prompt
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
)


class GrpcTransport:
    """See Transport. One connection carries everything.

    Args:
        target: where the server is.
        credentials: what it may ask for.
    """

    def __init__(self, target: Target, credentials: Credentials | None = None) -> None:
        credentials = credentials or Credentials()
        self._metadata = credentials.headers
        self._channel = (
            aio.secure_channel(target.authority, credentials.channel_credentials(), _OPTIONS)
            if target.secure
            else aio.insecure_channel(target.authority, _OPTIONS)
        )
        # Replies of a stream stay bytes: parsing them would delay the other requests.
        self._generate_stream = self._channel.unary_stream(_path("GenerateStream"), bytes)
        self._tokenize = self._channel.unary_unary(
            _path("Tokenize"), bytes, pb.TokenizeResponse.parse
        )
        self._metrics = self._channel.unary_unary(_path("Metrics"), bytes, HttpBody.parse)

    async def token_stops(self, text: str) -> list[int]:
        """See Transport."""
        async with _translated():
            request = pb.TokenizeRequest(inputs=text)
            reply: pb.TokenizeResponse = await self._tokenize(
                request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata
            )
        return [token.stop for token in reply.tokens]

    async def metrics(self) -> str:
        """See Transport."""
        async with _translated():
            reply: HttpBody = await self._metrics(
                pb.MetricsRequest(), timeout=UNARY_TIMEOUT_S, metadata=self._metadata
            )
        return reply.data.decode(errors="replace")

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        """See Transport."""
        parameters = pb.GenerateParameters(
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=task.max_new_tokens,
            seed=task.seed,
        )
        request = pb.GenerateRequest(inputs=task.prompt, parameters=parameters)
        call = self._generate_stream(request, metadata=self._metadata)
        last = b""
        try:
            async with _translated():
                async for reply in call:
                    last = reply
                    yield
        finally:
            call.cancel()  # if the caller stopped reading; otherwise the call has ended
        if pb.GenerateStreamResponse.parse(last).generated_text is None:
            raise RequestFailed(INCOMPLETE)

    async def close(self) -> None:
        """See Transport."""
        await self._channel.close()


def _path(method: str) -> str:
    return f"/{SERVICE}/{method}"


@contextlib.asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except aio.AioRpcError as error:
        raise RequestFailed(_failure(error)) from error


def _failure(error: Any) -> Failure:
    code, message = error.code().name, error.details() or ""
    error_type = _error_type(error.trailing_metadata())
    if error_type is None and code == "UNAVAILABLE":
        return Failure("connection", code, message)
    return Failure(error_type or "grpc", code, message)


def _error_type(trailers: Any) -> str | None:
    """REST's `error_type`, from google.rpc.ErrorInfo."""
    raw = dict(trailers or ()).get("grpc-status-details-bin")
    if raw is None:
        return None
    with contextlib.suppress(DecodeError):
        for detail in status_pb2.Status.FromString(raw).details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return str(info.metadata["error_type"])
    return None
