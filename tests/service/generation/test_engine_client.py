"""The service's end of the engine's socket: real engine servers over a fake model."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.protocol import wire
from engine.protocol.request import (
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    Token,
)
from engine.server import EngineServer
from service.errors import ErrorKind, ServiceError
from service.generation.engine_client import EngineClient
from tests.engine.fakes import make_engine, run, token_ids
from tests.service.fakes import INFO, TIMEOUT_S, eventually

PROMPT = tuple(range(1, 14))
GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, seed=2**64 - 3, temperature=1.5, top_p=0.95)

StartEngine = Callable[[Engine], Path]


class Wire:
    """The way between client and engine: it can be cut, and laid to another engine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target: Path | None = None
        self.num_connections = 0
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._connect, self.path)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """The engine is gone, from one moment to the next."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.target is not None
        far_reader, far_writer = await asyncio.open_unix_connection(self.target)
        self._writers += [writer, far_writer]
        self.num_connections += 1
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_pump(source, sink))
            self._pumps.add(task)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()


@pytest.fixture
def start_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEngine]:
    """Serves an engine in a thread; the path of its socket."""
    monkeypatch.setattr("engine.server._HEARTBEAT_S", 0.01)
    running: list[tuple[EngineServer, threading.Thread, Engine]] = []

    def start(engine: Engine) -> Path:
        path = tmp_path / f"engine{len(running)}.sock"
        server = EngineServer(engine, INFO, path)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread, engine))
        return path

    yield start
    for server, thread, engine in running:
        server.stop()
        gate = engine._executor._forward.gate  # type: ignore[attr-defined]
        if gate is not None:
            gate.release(1000)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.fixture
async def line(tmp_path: Path, start_engine: StartEngine) -> AsyncGenerator[Wire]:
    """A way to engines; it is closed before they are."""
    line = Wire(tmp_path / "line.sock")
    await line.open()
    yield line
    await line.close()


@pytest.fixture
async def client(line: Wire) -> AsyncGenerator[EngineClient]:
    """A client of whatever the line leads to."""
    client = EngineClient(line.path)
    yield client
    await client.close()


async def connect(client: EngineClient, line: Wire, path: Path) -> None:
    line.target = path
    client.start()
    async with asyncio.timeout(TIMEOUT_S):
        assert await client.ready() == INFO


def make_request(
    request_id: str = "r", sampling: SamplingParams = GREEDY, **changes: object
) -> Request:
    values = {"prompt_token_ids": PROMPT, "max_new_tokens": 12} | changes
    return Request(request_id=request_id, sampling=sampling, **values)  # type: ignore[arg-type]


async def collect(client: EngineClient, request: Request) -> list[SequenceOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in client.generate(request)]


async def take(outputs: AsyncGenerator[SequenceOutput], count: int) -> list[SequenceOutput]:
    """The outputs until so many tokens have come."""
    taken: list[SequenceOutput] = []
    async with asyncio.timeout(TIMEOUT_S):
        while len(token_ids(taken)) < count:
            taken.append(await anext(outputs))
    return taken


async def rest(outputs: AsyncGenerator[SequenceOutput]) -> list[SequenceOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in outputs]


def alone(request: Request) -> list[SequenceOutput]:
    """What an engine gives that is never interrupted."""
    return run(make_engine(), request)[request.request_id]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_stream_brings_what_the_engine_gives(
    client: EngineClient, line: Wire, start_engine: StartEngine, sampling: SamplingParams
) -> None:
    await connect(client, line, start_engine(make_engine()))
    request = make_request(sampling=sampling)
    outputs = await collect(client, request)
    assert token_ids(outputs) == token_ids(alone(request))
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_streams_do_not_mix(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    await connect(client, line, start_engine(make_engine()))
    requests = [
        make_request(str(seed), SamplingParams(do_sample=True, seed=seed)) for seed in range(8)
    ]
    results = await asyncio.gather(*(collect(client, request) for request in requests))
    for request, outputs in zip(requests, results, strict=True):
        assert token_ids(outputs) == token_ids(alone(request))


def test_ids_are_never_used_twice(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none")
    assert len({client.new_request_id() for _ in range(100)}) == 100


async def test_an_engine_may_refuse(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    await connect(client, line, start_engine(make_engine()))
    (output,) = await collect(client, make_request(max_new_tokens=100_000))
    assert output.error


async def test_closing_a_stream_aborts_it(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    gate = threading.Semaphore(3)
    await connect(client, line, start_engine(make_engine(gate=gate)))
    outputs = client.generate(make_request(max_new_tokens=40))
    await take(outputs, 2)
    await outputs.aclose()
    gate.release(10)  # far fewer steps than tokens were asked for
    await eventually(lambda: client.stats.num_running == 0 and client.stats.num_steps > 0)
    assert client.stats.num_generated_tokens < 40
    assert client.stats.num_free_blocks == client.stats.num_blocks


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
async def test_a_new_engine_goes_on_where_the_old_one_stopped(
    client: EngineClient,
    line: Wire,
    start_engine: StartEngine,
    sampling: SamplingParams,
    num_tokens: int,
) -> None:
    gate = threading.Semaphore(num_tokens)
    await connect(client, line, start_engine(make_engine(gate=gate)))
    request = make_request(sampling=sampling)
    async with aclosing(client.generate(request)) as outputs:
        reader = asyncio.create_task(anext(outputs)) if num_tokens == 0 else None
        first = [] if reader else await take(outputs, num_tokens)
        await asyncio.sleep(0)
        line.target = start_engine(make_engine())
        line.cut()
        if reader:
            async with asyncio.timeout(TIMEOUT_S):
                first = [await reader]
        assert token_ids(first + await rest(outputs)) == token_ids(alone(request))
    assert line.num_connections == 2


async def test_a_stream_survives_two_engines(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    request = make_request(sampling=SAMPLED)
    await connect(client, line, start_engine(make_engine(gate=threading.Semaphore(3))))
    async with aclosing(client.generate(request)) as outputs:
        got = await take(outputs, 3)
        line.target = start_engine(make_engine(gate=threading.Semaphore(4)))
        line.cut()
        got += await take(outputs, 4)
        line.target = start_engine(make_engine())
        line.cut()
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
    assert got[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("num_steps", [1, 2, 5])
async def test_prompt_logprobs_are_not_repeated(
    client: EngineClient, line: Wire, start_engine: StartEngine, num_steps: int
) -> None:
    """The prompt takes three steps; the engine goes during it, or behind it."""
    gate = threading.Semaphore(num_steps)
    await connect(client, line, start_engine(make_engine(max_step_tokens=5, gate=gate)))
    request = make_request(prompt_logprobs=True)
    async with aclosing(client.generate(request)) as outputs:
        async with asyncio.timeout(TIMEOUT_S):
            got = [await anext(outputs) for _ in range(num_steps)]
        line.target = start_engine(make_engine(max_step_tokens=4))
        line.cut()
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
    logprobs = [value for output in got for value in output.prompt_logprobs]
    expected = [value for output in alone(request) for value in output.prompt_logprobs]
    assert len(logprobs) == len(PROMPT)
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(expected[1:])


async def test_a_request_does_not_outlive_its_third_engine(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    await connect(client, line, start_engine(make_engine(gate=threading.Semaphore(0))))
    task = asyncio.create_task(collect(client, make_request()))
    for _ in range(3):
        await asyncio.sleep(0)
        assert not task.done()
        greeting = client.info
        line.cut()
        await eventually(lambda greeting=greeting: client.info is not greeting)
    (output,) = await task
    assert output.error == "the engine died too often"
    assert output.finish_reason is None


async def test_without_an_engine_nothing_is_begun(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "nobody.sock")
    client.start()
    assert not client.is_healthy
    with pytest.raises(ServiceError) as refused:
        await collect(client, make_request())
    assert refused.value.kind is ErrorKind.UNHEALTHY
    await client.close()


async def test_an_engine_may_come_later(
    client: EngineClient, line: Wire, start_engine: StartEngine, tmp_path: Path
) -> None:
    late = EngineClient(tmp_path / "engine0.sock")
    late.start()
    await asyncio.sleep(0)
    start_engine(make_engine())
    async with asyncio.timeout(TIMEOUT_S):
        assert await late.ready() == INFO
    assert late.is_healthy
    await late.close()


async def test_a_lost_engine_is_unhealthy(
    client: EngineClient, line: Wire, start_engine: StartEngine, tmp_path: Path
) -> None:
    await connect(client, line, start_engine(make_engine()))
    assert client.is_healthy
    line.target = tmp_path / "nobody.sock"
    line.cut()
    await eventually(lambda: not client.is_healthy)
    assert client.info == INFO


async def test_a_frozen_engine_is_unhealthy(line: Wire, start_engine: StartEngine) -> None:
    client = EngineClient(line.path, stall_s=0.5)
    gate = threading.Semaphore(0)
    await connect(client, line, start_engine(make_engine(gate=gate)))
    await eventually(lambda: client.is_healthy)
    task = asyncio.create_task(collect(client, make_request()))
    await eventually(lambda: not client.is_healthy)
    assert client.is_connected
    gate.release(1000)
    await task
    await eventually(lambda: client.is_healthy)
    await client.close()


async def test_closing_ends_what_runs(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    await connect(client, line, start_engine(make_engine(gate=threading.Semaphore(1))))
    outputs = client.generate(make_request())
    await take(outputs, 1)
    await client.close()
    (last,) = await rest(outputs)
    assert last.error == "the server is shutting down"
    assert not client.is_connected


async def test_listeners_hear_of_every_step(
    client: EngineClient, line: Wire, start_engine: StartEngine
) -> None:
    steps: list[StepOutput] = []
    client.on_step.append(steps.append)
    await connect(client, line, start_engine(make_engine()))
    await collect(client, make_request())
    assert client.last_step in steps
    assert sum(item.num_prefill_tokens for item in steps) == len(PROMPT)


# What an engine of ours never sends.


class Puppet:
    """An engine's socket whose messages the test writes; one handler per connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )
        self.server: asyncio.Server | None = None

    async def open(self) -> None:
        self.server = await asyncio.start_unix_server(
            lambda reader, writer: self.connections.put_nowait((reader, writer)), self.path
        )

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.connections.get()


@pytest.fixture
async def puppet(tmp_path: Path) -> AsyncGenerator[Puppet]:
    puppet = Puppet(tmp_path / "puppet.sock")
    await puppet.open()
    yield puppet
    assert puppet.server is not None
    puppet.server.close()


async def received(reader: asyncio.StreamReader) -> tuple[wire.Kind, list[object]]:
    """The next message of the client."""
    async with asyncio.timeout(TIMEOUT_S):
        (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        return wire.parse(await reader.readexactly(size))


ENDED = StepOutput(
    outputs=(
        SequenceOutput(request_id="a", token=Token(5, -0.5), finish_reason=FinishReason.EOS_TOKEN),
    )
)


async def test_what_has_ended_is_not_sent_to_a_new_engine(puppet: Puppet) -> None:
    client = EngineClient(puppet.path)
    client.start()
    reader, writer = await puppet.connection()
    writer.write(wire.ready(INFO))
    await client.ready()
    outputs = client.generate(make_request("a"))
    pending = asyncio.create_task(anext(outputs))
    await received(reader)
    # A first token for the reader, and the last one, which it has not asked for yet.
    first = SequenceOutput(request_id="a", token=Token(4, -0.5))
    writer.write(wire.step(StepOutput(outputs=(first,))))
    assert await pending == first
    writer.write(wire.step(ENDED))
    await eventually(lambda: client.last_step == ENDED)
    writer.close()
    reader, writer = await puppet.connection()
    again = StepOutput(stats=EngineStats(num_steps=7))
    writer.write(wire.ready(INFO) + wire.step(again))
    await eventually(lambda: client.last_step == again)
    other = asyncio.create_task(anext(client.generate(make_request("b"))))
    try:
        _, fields = await received(reader)
        assert fields[0] == "b"
    finally:
        other.cancel()
        await outputs.aclose()
        await client.close()
        writer.close()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(wire.frame(wire.Kind.STEP, 1)[4:], id="a step with too few fields"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x91\x63", id="an unknown kind"),
        pytest.param(b"\x01", id="no list"),
        pytest.param(
            wire.frame(wire.Kind.READY, {"model": "newer"})[4:],
            id="another version's greeting",
        ),
    ],
)
async def test_nonsense_costs_the_connection_and_no_more(
    puppet: Puppet, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = EngineClient(puppet.path)
    client.start()
    _, writer = await puppet.connection()
    with caplog.at_level(logging.ERROR, "service.generation.engine_client"):
        writer.write(wire.HEADER.pack(len(body)) + body)
        try:
            async with asyncio.timeout(2):  # reconnecting takes no time
                _, second = await puppet.connections.get()
            second.write(wire.ready(INFO))
            async with asyncio.timeout(TIMEOUT_S):
                assert await client.ready() == INFO
            second.close()
        finally:
            writer.close()
            with suppress(TypeError):
                await client.close()
    assert "cannot be read" in caplog.text
