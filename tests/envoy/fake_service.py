"""A fake of the service for tests of Envoy: a gRPC server whose behaviour the tests set."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from service.bundled import DESCRIPTORS
from service.launch.edge import MAX_METADATA_BYTES
from service.routes import SERVICE

DEADLINE = 60.0  # seconds for anything that is waited for; the machine may be busy

Context = Any  # grpc.aio.ServicerContext, generic in types that do not matter here
Unary = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any]]
Behaviour = Unary | Stream
T = TypeVar("T")


class Messages:
    """The message classes, from the same descriptor set that Envoy reads."""

    def __init__(self) -> None:
        """Reads the descriptor set."""
        files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
        self.pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self.pool.Add(file)
        # Reflection looks for the health messages in the same pool.
        self.pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)
        self.service = self.pool.FindServiceByName(SERVICE)

    def new(self, name: str, **fields: Any) -> Any:
        """Returns a message with these fields; a name without dots is one of `tokenwire.v1`."""
        full_name = name if "." in name else f"tokenwire.v1.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(full_name))(**fields)

    def parser(self, descriptor: Any) -> Callable[[bytes], Message]:
        """Returns the parsing function of a message type."""
        return message_factory.GetMessageClass(descriptor).FromString

    def reply(self, method: str, body: bytes, content_type: str = "application/json") -> Any:
        """Returns the reply of `method` that makes REST clients see `body`."""
        http = self.new("google.api.HttpBody", content_type=content_type, data=body)
        output = self.service.methods_by_name[method].output_type
        if output.name == "HttpBody":
            return http
        has_path = "http" in output.fields_by_name
        return self.new(output.full_name, **({"http": http} if has_path else {}))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as the fake service received it."""

    method: str
    request: Any
    metadata: dict[str, str]


class Gate:
    """Blocks a handler until the test opens it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes a closed gate for handlers on `loop`."""
        self._loop = loop
        self._event = asyncio.Event()

    def open(self) -> None:
        """Lets the handler continue."""
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Waits in the handler."""
        await self._event.wait()


class FakeService:
    """A grpc.aio server on a thread of its own; tests set the behaviour of each method."""

    def __init__(self, messages: Messages, port: int = 0, host: str = "127.0.0.1") -> None:
        """Starts the server on this port, or on a free one."""
        self.messages = messages
        self.calls: list[Call] = []
        self.behaviours: dict[str, Behaviour] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self._start(host, port))

    def behave(self, method: str, behaviour: Behaviour) -> None:
        """Sets what `method` does."""
        self.behaviours[method] = behaviour

    def reply(self, method: str, *bodies: bytes, content_type: str = "application/json") -> None:
        """Makes `method` send these HTTP bodies, one message each."""
        replies = [self.messages.reply(method, body, content_type) for body in bodies]

        async def stream(_request: Any, _context: Context) -> AsyncIterator[Any]:
            for reply in replies:
                yield reply

        async def unary(_request: Any, _context: Context) -> Any:
            return replies[0]

        self.behave(method, stream if self._streams(method) else unary)

    def fail(self, method: str, code: grpc.StatusCode, text: str, **trailing: str | bytes) -> None:
        """Makes `method` abort; the keys of trailing metadata are written with _ instead of -."""
        metadata = tuple((key.replace("_", "-"), value) for key, value in trailing.items())

        async def stream(_request: Any, context: Context) -> AsyncIterator[Any]:
            await context.abort(code, text, metadata)
            yield None

        async def unary(_request: Any, context: Context) -> Any:
            await context.abort(code, text, metadata)

        self.behave(method, stream if self._streams(method) else unary)

    def gate(self) -> Gate:
        """Returns a new closed gate for a handler."""
        return Gate(self._loop)

    def set_serving(self, serving: bool) -> None:
        """Sets the status of the gRPC health service."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        self._run(self._health.set(SERVICE, status))

    def reset(self) -> None:
        """Forgets all calls; every method answers `{"method": name}` again."""
        self.calls.clear()
        for name in self.messages.service.methods_by_name:
            self.reply(name, f'{{"method":"{name}"}}'.encode())

    def stop(self) -> None:
        """Ends the server and its thread."""
        self._run(self._server.stop(grace=None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    async def _start(self, host: str, port: int) -> int:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", 8 << 20),
                ("grpc.max_send_message_length", 16 << 20),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ]
        )
        handlers = {method.name: self._handler(method) for method in self.messages.service.methods}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection((SERVICE,), self._server, pool=self.messages.pool)
        bound: int = self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()
        return bound

    def _handler(self, method: Any) -> Any:
        def note(request: Any, context: Context) -> None:
            metadata = {key: str(value) for key, value in context.invocation_metadata()}
            self.calls.append(Call(method.name, request, metadata))

        async def unary(request: Any, context: Context) -> Any:
            note(request, context)
            behaviour: Any = self.behaviours[method.name]
            return await behaviour(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            note(request, context)
            behaviour: Any = self.behaviours[method.name]
            async for reply in behaviour(request, context):
                yield reply

        parser = self.messages.parser(method.input_type)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parser, serialize)
        return grpc.unary_unary_rpc_method_handler(unary, parser, serialize)

    def _streams(self, method: str) -> bool:
        return bool(self.messages.service.methods_by_name[method].server_streaming)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(DEADLINE)


def serialize(message: Message) -> bytes:
    return message.SerializeToString()
