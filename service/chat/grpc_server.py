"""The server over gRPC, on its own port or through the gateway."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from ..bundled import DESCRIPTORS
from ..client.credentials import Credentials
from ..client.target import Target
from ..routes import SERVICE
from .answer import HEADERS, ChatError, Piece, piece, refusal

_OPTIONS = (("grpc.enable_http_proxy", 0),)
_UNARY_TIMEOUT_S = 30.0


class GrpcServer:
    """See Server. Requests and replies are JSON here, as over REST.

    Args:
        target: where the server is.
        credentials: what it may ask for.
    """

    def __init__(self, target: Target, credentials: Credentials) -> None:
        self._url = target.url
        self._metadata = (*credentials.headers, *HEADERS)
        self._channel = (
            grpc.secure_channel(target.authority, credentials.channel_credentials(), _OPTIONS)
            if target.secure
            else grpc.insecure_channel(target.authority, _OPTIONS)
        )
        self._service = _pool().FindServiceByName(SERVICE)

    def model(self) -> str:
        """See Server."""
        call, request = self._method(self._channel.unary_unary, "Info", {})
        with self._translated():
            reply = call(request, timeout=_UNARY_TIMEOUT_S, metadata=self._metadata)
        return str(reply.model_id)

    def answer(self, body: dict[str, Any]) -> Generator[Piece]:
        """See Server."""
        start, request = self._method(self._channel.unary_stream, "Chat", body)
        call = start(request, metadata=self._metadata)
        try:
            with self._translated():
                for reply in call:
                    yield piece(_plain(reply.chunk))
        finally:
            call.cancel()  # if the caller stopped reading; otherwise the call has ended

    def close(self) -> None:
        """See Server."""
        self._channel.close()

    def _method(self, kind: Any, name: str, body: dict[str, Any]) -> tuple[Any, Any]:
        """A method of the channel, and its request."""
        method = self._service.methods_by_name[name]
        request, reply = map(
            message_factory.GetMessageClass, (method.input_type, method.output_type)
        )
        call = kind(
            f"/{SERVICE}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=reply.FromString,
        )
        try:
            return call, json_format.ParseDict(body, request())
        except json_format.ParseError as error:
            raise ChatError(" ".join(str(error).split())) from None

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: Any) -> ChatError:
        code, message = error.code().name, error.details() or ""
        trailers = {**dict(error.initial_metadata() or ()), **dict(error.trailing_metadata() or ())}
        if code == "UNAVAILABLE" and "grpc-status-details-bin" not in trailers:
            return ChatError(f"no answer from {self._url}: {' '.join(message.split())}")
        return refusal(code, message, trailers.get("retry-after"))


def _pool() -> Any:
    """The service's descriptors, apart from those of the process."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        pool.Add(file)
    return pool


def _plain(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found
