"""A service made and run as in production: over an engine's socket, on a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import h2.events
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from engine.server import EngineServer
from service.api import rpc
from service.api.grpc_server import make_server
from service.app import App
from service.generation.metrics import Metrics
from service.launch.settings import Settings
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.engine.fakes import make_engine
from tests.raw_http2 import raw_connection
from tests.service.fakes import INFO, LIMITS, MODEL, TIMEOUT_S


@pytest.fixture
def gate() -> threading.Semaphore | None:
    """What the engine's steps wait for."""
    return None


@pytest.fixture
async def app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Semaphore | None
) -> AsyncGenerator[App]:
    monkeypatch.setattr("engine.server._IDLE_STEP_S", 0.01)
    monkeypatch.setattr("service.app._HEALTH_INTERVAL_S", 0.01)
    path = tmp_path / "engine.sock"
    server = EngineServer(make_engine(gate=gate), INFO, path)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    app = App(
        Settings(
            model_id=str(MODEL),
            engine_socket=path,
            grpc_port=0,
            drain_seconds=600,  # no test waits for it
            build_sha="c0ffee",
            build_label="a-label",
        )
    )
    await app.start()
    running = asyncio.create_task(app.run())
    yield app
    app.stop()
    async with asyncio.timeout(TIMEOUT_S):
        await running
    server.stop()
    await asyncio.to_thread(thread.join, TIMEOUT_S)
    assert not thread.is_alive()


@pytest.fixture
async def channel(app: App) -> AsyncGenerator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        yield channel


async def test_info_has_the_limits_of_the_engine(app: App, channel: aio.Channel) -> None:
    ask = channel.unary_unary(f"/{SERVICE}/Info", bytes, pb.InfoResponse.parse)
    info = await ask(pb.InfoRequest())
    assert (info.max_total_tokens, info.max_input_tokens) == (200, 199)
    assert info.max_batch_total_tokens == 400
    assert (info.sha, info.docker_label) == ("c0ffee", "a-label")


async def test_an_old_connection_is_told_to_go() -> None:
    settings = Settings(model_id=str(MODEL), max_connection_seconds=1)
    server = make_server(settings, Metrics(LIMITS), from_gateway=False)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(TIMEOUT_S), raw_connection(port) as connection:
            await connection.of(h2.events.ConnectionTerminated)
    finally:
        await server.stop(None)


async def test_services_can_be_listed_and_described(app: App) -> None:
    def describe() -> tuple[set[str], set[str], str]:
        with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName(SERVICE)
            request = pool.FindMessageTypeByName("tokenwire.v1.GenerateRequest")
            kind = request.fields_by_name["parameters"].message_type.full_name
            names = {method.name for method in service.methods}
            return set(database.get_services()), names, kind

    services, methods, kind = await asyncio.to_thread(describe)
    assert services == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    known = rpc.load_pool().FindServiceByName(SERVICE).methods
    assert methods == {method.name for method in known}
    assert kind == "tokenwire.v1.GenerateParameters"


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_the_engine(app: App, channel: aio.Channel, service: str) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check
    request = health_pb2.HealthCheckRequest(service=service)

    async def serves() -> bool:
        try:
            reply = await check(request)
        except aio.AioRpcError:  # unknown before the first check of the engine
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async with asyncio.timeout(TIMEOUT_S):
        while not await serves():
            pass


async def test_health_can_be_watched(app: App, channel: aio.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch
    async with asyncio.timeout(TIMEOUT_S):
        async for reply in watch(health_pb2.HealthCheckRequest(service="")):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                break


async def test_who_watches_the_health_is_told_of_the_end(app: App, channel: aio.Channel) -> None:
    watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
    async with asyncio.timeout(TIMEOUT_S):
        replies = [await watching.read()]
        app.stop()
        with pytest.raises(aio.AioRpcError, match="shutting down") as ended:
            while True:
                replies.append(await watching.read())
    assert replies[-1].status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watcher_that_reads_nothing_holds_up_no_change_of_health(
    app: App, channel: aio.Channel
) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check
    async with asyncio.timeout(TIMEOUT_S), raw_connection(app.port, window=0) as connection:
        message = health_pb2.HealthCheckRequest().SerializeToString()
        watching = connection.grpc("/grpc.health.v1.Health/Watch", message)
        await connection.of(h2.events.ResponseReceived, watching)
        await asyncio.sleep(0)  # for it to write, which it cannot
        app._health.set("another", health_pb2.HealthCheckResponse.SERVING)
        reply = await check(health_pb2.HealthCheckRequest(service="another"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_reported(app: App, tmp_path: Path) -> None:
    second = App(
        Settings(
            model_id=str(MODEL),
            engine_socket=tmp_path / "engine.sock",
            grpc_port=app.port,
        )
    )
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: is it in use\?"):
        await second.start()
    await second._engines.close()


async def test_a_stopping_server_refuses_calls(
    tmp_path: Path, app: App, channel: aio.Channel
) -> None:
    app.stop()
    await app.stopped()
    ask = channel.unary_unary(f"/{SERVICE}/Health", bytes)

    async def refused() -> bool:
        try:
            await ask(pb.HealthRequest())
        except aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False

    async with asyncio.timeout(TIMEOUT_S):
        while not await refused():
            pass


@pytest.mark.parametrize("gate", [threading.Semaphore(0)])
async def test_generations_end_with_an_error_when_a_server_is_told_to_end_twice(
    app: App, channel: aio.Channel, gate: threading.Semaphore
) -> None:
    """As by a supervisor that gives up: nobody would let them finish."""
    request = pb.GenerateRequest(inputs="!")
    call = channel.unary_unary(f"/{SERVICE}/Generate", bytes)(request)
    waiting = asyncio.ensure_future(call)
    async with asyncio.timeout(TIMEOUT_S):
        while not app._admission.num_active:  # noqa: ASYNC110 - another connection
            await asyncio.sleep(0.01)
        app.stop()
        await asyncio.sleep(0)
        assert not waiting.done()
        app.stop()
        with pytest.raises(aio.AioRpcError, match="the server is shutting down") as ended:
            await waiting
    gate.release(1000)
    assert ended.value.code() is grpc.StatusCode.ABORTED


async def test_reflection_answers_by_its_newer_name(app: App, channel: aio.Channel) -> None:
    """As grpcurl and buf ask: they try v1 first. It describes itself, too."""
    info = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    names = (SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection")
    questions = [reflection_pb2.ServerReflectionRequest(list_services="")] + [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names
    ]
    async with asyncio.timeout(TIMEOUT_S):
        listed, *files = [answer async for answer in info(iter(questions))]
    assert {service.name for service in listed.list_services_response.service} >= {*names}
    for name, answer in zip(names, files, strict=True):
        file = descriptor_pb2.FileDescriptorProto.FromString(
            answer.file_descriptor_response.file_descriptor_proto[0]
        )
        assert f"{file.package}.{file.service[0].name}" == name


async def test_health_lists_all_services(app: App, channel: aio.Channel) -> None:
    reply = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert set(reply.statuses) == {"", SERVICE}


async def test_a_method_that_is_not_there_is_unimplemented(channel: aio.Channel) -> None:
    for path in (f"/{SERVICE}/Nothing", "/grpc.health.v1.Health/Nothing", "/other.Service/Method"):
        with pytest.raises(aio.AioRpcError) as failed:
            await channel.unary_unary(path)(b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
