"""Serves betterproto2 messages over grpc.aio, with handlers made from the descriptor set.

betterproto2 generates message classes but no servers for grpc.aio. The compiled descriptors name
every method with its types, so the handlers are made from them at start-up; a method without an
implementation fails there and not at the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import betterproto2
import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from grpc import aio

from ..bundled import DESCRIPTORS
from ..call_record import rename_call
from ..codec import headers, ids_apart
from ..codec.counts import check_body, check_counts, check_message
from ..codec.presenter import Reply
from ..codec.requests import NOTHING, READERS, Reader, Request
from ..errors import ErrorKind, ServiceError
from ..generation.limits import Limits
from ..grammar.checker import MAX_GRAMMAR_BYTES
from ..pb.google import api as _api  # noqa: F401  importing a package adds it to the pool
from ..pb.message_pool import default_message_pool
from ..pb.tokenwire import v1 as _v1  # noqa: F401
from ..routes import SERVICE
from ..workers.courtesy import give_way
from ..workers.lanes import Lanes
from . import health
from .call import Call

# Of requests that are parsed on the event loop, which takes up to 4 ms: betterproto2 takes 2 us per
# byte of JSON values in a message, and a body of many small values 0.1 us per byte.
_MAX_LOOP_BYTES = 2 * 1024
_MAX_LOOP_BODY_BYTES = 32 * 1024
# Of a reply that may go out in one write: this process may end between two.
_MAX_WRITE_BYTES = 32 * 1024

# Takes a message's bytes, and whether a REST caller sent it.
Decoder = Callable[[bytes, bool], Request]


def load_pool() -> DescriptorPool:
    """Loads all descriptors into a pool of their own: the default one has another google/api."""
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    pool = DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


def method_names() -> list[str]:
    """The full names of all methods of the service, and of the health service."""
    service = load_pool().FindServiceByName(SERVICE)
    names = [f"/{SERVICE}/{method.name}" for method in service.methods]
    return [*names, *(f"/{health.SERVICE_NAME}/{name}" for name in ("Check", "List", "Watch"))]


def handlers(
    servicer: object, pool: DescriptorPool, limits: Limits, lanes: Lanes, *, from_gateway: bool
) -> grpc.GenericRpcHandler:
    """Makes the handlers of all methods of the service.

    Args:
        servicer: has a method for every RPC, which takes a request of the domain and the call.
        pool: the descriptors.
        limits: those in force.
        lanes: where requests are parsed.
        from_gateway: whether all calls come from the gateway, some of them for REST callers.

    Raises:
        AttributeError: the servicer lacks a method.
    """
    service = pool.FindServiceByName(SERVICE)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            method.name: _handler(servicer, method, limits, lanes, from_gateway)
            for method in service.methods
        },
    )


def _handler(
    servicer: object, method: MethodDescriptor, limits: Limits, lanes: Lanes, from_gateway: bool
) -> grpc.RpcMethodHandler[Any, Any]:
    function = getattr(servicer, betterproto2.casing.snake_case(method.name))
    decode = _decoder(method.input_type, READERS.get(method.name, NOTHING), limits)
    if method.server_streaming:

        async def stream(raw: bytes, context: aio.ServicerContext[Any, Any]) -> None:
            call = Call(context, from_gateway=from_gateway, num_bytes=len(raw))
            request = await _decoded(decode, raw, call.is_rest, lanes)
            replies = function(request, call)
            if inspect.iscoroutine(replies):  # which prepares them, and is not passed by each
                replies = await replies
            async with aclosing(replies), aclosing(call):
                async for reply in replies:
                    await call.write(reply)

        return grpc.unary_stream_rpc_method_handler(stream, None, serialise)

    async def unary(raw: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        call = Call(context, from_gateway=from_gateway, num_bytes=len(raw))
        reply = serialise(await function(await _decoded(decode, raw, call.is_rest, lanes), call))
        if len(reply) > _MAX_WRITE_BYTES and not call.has_begun:
            await call.send_headers(headers.of_whole())
        return reply

    return grpc.unary_unary_rpc_method_handler(unary, None, None)


def serialise(reply: Reply) -> bytes:
    """The bytes of a reply; REST replies and hand-framed ones are bytes already."""
    return reply if isinstance(reply, bytes) else reply.__bytes__()


def _check_sizes(message: Message) -> None:
    """Refuses schemas that betterproto2 would take seconds to parse, unlike google's parser.

    Raises:
        ServiceError: a schema is too large.
    """
    for name in ("parameters", "response_format", "text", "tools"):
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


async def _decoded(decode: Decoder, raw: bytes, is_rest: bool, lanes: Lanes) -> Request:
    """Reads a request, in a thread if it is large."""
    small_bytes = _MAX_LOOP_BODY_BYTES if is_rest else _MAX_LOOP_BYTES
    return await lanes.run(len(raw), small_bytes, decode, raw, is_rest)


def _decoder(descriptor: Descriptor, reader: Reader, limits: Limits) -> Decoder:
    """Makes a strict parser: google's checks the bytes, since betterproto2 accepts broken ones."""
    checked: type[Message] = message_factory.GetMessageClass(descriptor)
    url = f"type.googleapis.com/{descriptor.full_name}"
    message_class: type[betterproto2.Message] = default_message_pool.url_to_type[url]
    takes_body = "http" in descriptor.fields_by_name
    # Where it is optional it names the call; where it is not, as in Abort, it means another one.
    id_field = descriptor.fields_by_name.get("request_id")
    takes_id = id_field is not None and id_field.has_presence

    def decode(raw: bytes, is_rest: bool) -> Request:
        check_message(raw, checked, limits)
        try:
            message: Any = checked.FromString(raw)
        except DecodeError as error:
            raise ServiceError(ErrorKind.SHAPE, f"invalid {descriptor.name} bytes") from error
        give_way()
        if takes_body and is_rest:
            body = message.http.data
            check_body(body, limits)
            return reader.from_body(body, limits)
        if takes_body and message.HasField("http"):
            raise ServiceError(
                ErrorKind.SHAPE, "`http` is for the gateway: use the other fields", field="http"
            )
        if takes_id and message.HasField("request_id") and not rename_call(message.request_id):
            raise ServiceError(
                ErrorKind.VALIDATION,
                "`request_id` must be 1 to 128 visible characters of ASCII",
                field="request_id",
            )
        check_counts(message, limits)
        _check_sizes(message)
        size = message.ByteSize()
        message.DiscardUnknownFields()  # known fields of the wrong wire type are among them
        # The bytes as received: google's parser loses the order of keys, and an answer has the
        # order of keys in its JSON Schema.
        data = raw if message.ByteSize() == size else message.SerializeToString()
        return reader.from_message(ids_apart.parse(message_class, data, message))

    return decode
