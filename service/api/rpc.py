"""Serves betterproto2 messages over grpc.aio, with handlers made from the descriptor set.

betterproto2 generates message classes but no servers for grpc.aio. The compiled descriptors name
every method with its types, so the handlers are made from them at start-up; a method without an
implementation fails there and not at the first call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import betterproto2
import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from grpc import aio

from ..bundled import DESCRIPTORS
from ..codec.presenter import Reply
from ..errors import ErrorKind, ServiceError
from ..grammar.checker import MAX_GRAMMAR_BYTES
from ..pb.google import api as _api  # noqa: F401  importing a package adds it to the pool
from ..pb.message_pool import default_message_pool
from ..pb.tokenwire import v1 as _v1  # noqa: F401
from ..routes import SERVICE
from .call import Call

_MAX_LOOP_BYTES = 4 * 1024  # of a message parsed on the event loop, which takes some milliseconds


def load_pool() -> DescriptorPool:
    """Loads all descriptors into a pool of their own: the default one has another google/api."""
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


def handlers(servicer: object, pool: DescriptorPool) -> grpc.GenericRpcHandler:
    """Makes the handlers of all methods of the service.

    Raises:
        AttributeError: the servicer lacks a method.
    """
    service = pool.FindServiceByName(SERVICE)
    return grpc.method_handlers_generic_handler(
        SERVICE, {method.name: _handler(servicer, method) for method in service.methods}
    )


def _handler(servicer: object, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
    function = getattr(servicer, betterproto2.casing.snake_case(method.name))
    decode = _decoder(method.input_type)
    if method.server_streaming:

        async def stream(
            raw: bytes, context: aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Reply]:
            call = Call(context)
            replies = function(await _decoded(decode, raw), call)
            try:
                async for reply in replies:
                    yield reply
            finally:
                await replies.aclose()

        return grpc.unary_stream_rpc_method_handler(stream, None, serialise)

    async def unary(raw: bytes, context: aio.ServicerContext[Any, Any]) -> Reply:
        call = Call(context)
        reply: Reply = await function(await _decoded(decode, raw), call)
        return reply

    return grpc.unary_unary_rpc_method_handler(unary, None, serialise)


def serialise(reply: Reply) -> bytes:
    """The bytes of a reply; REST replies and hand-framed ones are bytes already."""
    return reply if isinstance(reply, bytes) else reply.__bytes__()


def _check_sizes(message: Message) -> None:
    """Refuses schemas that betterproto2 would take seconds to parse, unlike google's parser.

    Raises:
        ServiceError: a schema is too large.
    """
    for name in ("parameters", "response_format", "tools"):
        if name not in message.DESCRIPTOR.fields_by_name:
            continue
        value = getattr(message, name)
        if name == "parameters":
            name, value = "parameters.grammar", value.grammar
        size = sum(item.ByteSize() for item in value) if name == "tools" else value.ByteSize()
        if size > MAX_GRAMMAR_BYTES:
            raise ServiceError(
                ErrorKind.VALIDATION,
                f"`{name}` must have at most {MAX_GRAMMAR_BYTES} bytes. Given: {size}",
                field=name,
            )


async def _decoded(decode: Callable[[bytes], betterproto2.Message], raw: bytes) -> Any:
    """Parses a message, in a thread if it is large: JSON values take 2 us a byte."""
    if len(raw) <= _MAX_LOOP_BYTES:
        return decode(raw)
    return await asyncio.to_thread(decode, raw)


def _decoder(descriptor: Descriptor) -> Callable[[bytes], betterproto2.Message]:
    """Makes a strict parser: google's checks the bytes, since betterproto2 accepts broken ones."""
    checked: type[Message] = message_factory.GetMessageClass(descriptor)
    url = f"type.googleapis.com/{descriptor.full_name}"
    message_class: type[betterproto2.Message] = default_message_pool.url_to_type[url]

    def decode(raw: bytes) -> betterproto2.Message:
        try:
            message = checked.FromString(raw)
        except DecodeError as error:
            raise ServiceError(ErrorKind.SHAPE, f"invalid {descriptor.name} bytes") from error
        _check_sizes(message)
        size = message.ByteSize()
        message.DiscardUnknownFields()  # known fields of the wrong wire type are among them
        if message.ByteSize() != size:
            return message_class.parse(message.SerializeToString())
        # The bytes as received: google's parser loses the order of keys, and an answer has the
        # order of keys in its JSON Schema.
        return message_class.parse(raw)

    return decode
