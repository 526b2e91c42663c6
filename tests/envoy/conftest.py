"""A real Envoy in front of a fake service whose behaviour the tests set, one pair per module.

No port is fixed: Envoy listens on port 0 and tells its port through the admin interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from service.bundled import DESCRIPTORS
from service.launch import gateway as gateway_module
from service.launch.gateway import GatewayConfig
from service.routes import SERVICE

DEADLINE = 20.0  # seconds that anything may take to come about on a busy machine

Context = Any  # grpc.aio.ServicerContext, generic in types that do not matter here
Unary = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any]]
Behaviour = Unary | Stream
T = TypeVar("T")


class Messages:
    """Message classes of the protos, from the descriptor set that Envoy reads too."""

    def __init__(self) -> None:
        """Reads the descriptor set."""
        files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
        self.pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self.pool.Add(file)
        # Reflection answers for these as well, and looks in the same pool.
        self.pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)
        self.service = self.pool.FindServiceByName(SERVICE)

    def new(self, name: str, **fields: Any) -> Any:
        """Returns a message of `tokenwire.v1`, or of a full name, with these fields."""
        full_name = name if "." in name else f"tokenwire.v1.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(full_name))(**fields)

    def parser(self, descriptor: Any) -> Callable[[bytes], Message]:
        """Returns the parsing function of a message type."""
        return message_factory.GetMessageClass(descriptor).FromString

    def reply(self, method: str, body: bytes, content_type: str = "application/json") -> Any:
        """Returns the reply of `method` that makes REST clients see `body`."""
        http = self.new("google.api.HttpBody", content_type=content_type, data=body)
        output = self.service.methods_by_name[method].output_type
        return http if output.name == "HttpBody" else self.new(output.full_name, http=http)


@dataclasses.dataclass(frozen=True)
class Call:
    """What the fake service saw of one call."""

    method: str
    request: Any
    metadata: dict[str, str]


class Gate:
    """Holds a handler up until the test opens it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes a closed gate for handlers on `loop`."""
        self._loop = loop
        self._event = asyncio.Event()

    def open(self) -> None:
        """Lets the handler go on."""
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Waits in the handler."""
        await self._event.wait()


class FakeService:
    """A grpc.aio server on its own thread that does per method what the test told it."""

    def __init__(self, messages: Messages) -> None:
        """Starts the server on a port of its own."""
        self.messages = messages
        self.calls: list[Call] = []
        self.behaviours: dict[str, Behaviour] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._run(self._start())

    def behave(self, method: str, behaviour: Behaviour) -> None:
        """Sets what `method` does."""
        self.behaviours[method] = behaviour

    def reply(self, method: str, *bodies: bytes, content_type: str = "application/json") -> None:
        """Lets `method` send these HTTP bodies, one message each."""
        replies = [self.messages.reply(method, body, content_type) for body in bodies]

        async def stream(_request: Any, _context: Context) -> AsyncIterator[Any]:
            for reply in replies:
                yield reply

        async def unary(_request: Any, _context: Context) -> Any:
            return replies[0]

        self.behave(method, stream if self._streams(method) else unary)

    def fail(self, method: str, code: grpc.StatusCode, text: str, **trailing: str | bytes) -> None:
        """Lets `method` abort with trailing metadata, written with _ for -."""
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
        """Sets what the gRPC health service says."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        self._run(self._health.set(SERVICE, status))

    def reset(self) -> None:
        """Forgets the calls and gives every method its default: `{"method": name}`."""
        self.calls.clear()
        for name in self.messages.service.methods_by_name:
            self.reply(name, f'{{"method":"{name}"}}'.encode())

    def stop(self) -> None:
        """Ends the server and its thread."""
        self._run(self._server.stop(grace=None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    async def _start(self) -> int:
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", 8 << 20),
                ("grpc.max_send_message_length", 16 << 20),
                ("grpc.http2.max_ping_strikes", 0),
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
        port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

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
            return grpc.unary_stream_rpc_method_handler(stream, parser, _serialize)
        return grpc.unary_unary_rpc_method_handler(unary, parser, _serialize)

    def _streams(self, method: str) -> bool:
        return bool(self.messages.service.methods_by_name[method].server_streaming)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(DEADLINE)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


@dataclasses.dataclass(frozen=True)
class Gateway:
    """A running Envoy: where it listens, and the service behind it."""

    target: str
    service: FakeService
    messages: Messages
    client: httpx.Client

    def wait_until_healthy(self, status: int = 200) -> None:
        """Returns once /health answers with `status`."""
        poll(lambda: self.client.get("/health").status_code == status, f"/health answers {status}")

    def channel(self) -> grpc.Channel:
        """Returns a channel for native gRPC."""
        return grpc.insecure_channel(self.target)

    def stub(self, channel: grpc.Channel, method: str) -> Any:
        """Returns the callable for `method` on `channel`."""
        descriptor = self.messages.service.methods_by_name[method]
        connect = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
        return connect(
            f"/{SERVICE}/{method}",
            request_serializer=_serialize,
            response_deserializer=self.messages.parser(descriptor.output_type),
        )


def poll(condition: Callable[[], T | None], what: str) -> T:
    """Returns the first true value of `condition`; fails with `what` after the deadline."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


@contextlib.contextmanager
def run_envoy(config: GatewayConfig, directory: Path) -> Iterator[int]:
    """Runs Envoy with `config` on ports of its choice; gives the listening port."""
    config = dataclasses.replace(config, listen_port=0, admin_port=0)
    path = directory / "envoy.yaml"
    path.write_text(gateway_module.render(config), encoding="utf-8")
    admin = directory / "admin-address"
    log = directory / "envoy.log"
    arguments = gateway_module.command(gateway_module.find_envoy(), path, concurrency=1)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*arguments, "--admin-address-path", str(admin)], stdout=output, stderr=output
        )
    try:
        yield poll(lambda: _listening_port(process, admin, log), "Envoy listens")
    finally:
        process.terminate()
        process.wait(DEADLINE)


def _listening_port(process: subprocess.Popen[bytes], admin: Path, log: Path) -> int | None:
    assert process.poll() is None, log.read_text()
    try:
        listeners = httpx.get(f"http://{admin.read_text()}/listeners?format=json").json()
        return int(
            listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"]
        )
    except (FileNotFoundError, httpx.HTTPError, httpx.InvalidURL, KeyError, IndexError):
        return None


StartGateway = Callable[..., "contextlib.AbstractContextManager[Gateway]"]


@pytest.fixture(scope="session")
def gateway_messages() -> Messages:
    """The message classes."""
    return Messages()


@pytest.fixture(scope="module")
def start_gateway(
    gateway_messages: Messages, tmp_path_factory: pytest.TempPathFactory
) -> StartGateway:
    """Starts a fake service and an Envoy with some fields of GatewayConfig changed."""

    @contextlib.contextmanager
    def start(**changes: Any) -> Iterator[Gateway]:
        service = FakeService(gateway_messages)
        service.reset()
        config = GatewayConfig(
            listen_host="127.0.0.1",
            listen_port=0,
            upstream_host="127.0.0.1",
            upstream_port=service.port,
            descriptors=DESCRIPTORS,
        )
        config = dataclasses.replace(config, **changes)
        scheme = "http" if config.tls_certificate is None else "https"
        directory = tmp_path_factory.mktemp("envoy")
        with contextlib.ExitStack() as stack:
            stack.callback(service.stop)
            port = stack.enter_context(run_envoy(config, directory))
            url = (
                f"{scheme}://localhost:{port}" if scheme == "https" else f"http://127.0.0.1:{port}"
            )
            trusted = ssl.create_default_context(cafile=config.tls_certificate)
            client = stack.enter_context(
                httpx.Client(base_url=url, timeout=DEADLINE, verify=trusted, trust_env=False)
            )
            yield Gateway(url.partition("//")[2], service, gateway_messages, client)

    return start


@pytest.fixture(scope="module")
def running_gateway(start_gateway: StartGateway) -> Iterator[Gateway]:
    """A gateway whose service was seen healthy."""
    with start_gateway() as gateway:
        gateway.wait_until_healthy()
        yield gateway


@pytest.fixture
def gateway(running_gateway: Gateway) -> Gateway:
    """The module's gateway, its service behaving as by default."""
    running_gateway.service.reset()
    return running_gateway
