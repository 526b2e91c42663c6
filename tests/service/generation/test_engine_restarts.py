"""Requests continue on a new engine, and the client reports whether it has a working one."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from engine.protocol import wire
from engine.protocol.request import FinishReason, SamplingParams
from service.generation.engine_client import EngineClient
from service.generation.tally import Tally
from tests.engine.fakes import make_engine, token_ids
from tests.service.fakes import INFO, TIMEOUT_S, eventually
from tests.service.generation.engines import (
    GREEDY,
    PROMPT,
    SAMPLED,
    SocketProxy,
    StartEngine,
    alone,
    collect,
    connect,
    make_request,
    rest,
    take,
)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
async def test_a_new_engine_continues_where_the_old_one_stopped(
    client: EngineClient,
    proxy: SocketProxy,
    start_engine: StartEngine,
    sampling: SamplingParams,
    num_tokens: int,
) -> None:
    gate = threading.Semaphore(num_tokens)
    await connect(client, proxy, start_engine(make_engine(gate=gate)))
    request = make_request(sampling=sampling)
    async with aclosing(client.generate(request)) as outputs:
        reader = asyncio.create_task(anext(outputs)) if num_tokens == 0 else None
        first = [] if reader else await take(outputs, num_tokens)
        await asyncio.sleep(0)
        proxy.target = start_engine(make_engine())
        proxy.cut()
        if reader:
            async with asyncio.timeout(TIMEOUT_S):
                first = [await reader]
        assert token_ids(first + await rest(outputs)) == token_ids(alone(request))
    assert proxy.num_connections == 2


async def test_a_stream_survives_two_engines(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    request = make_request(sampling=SAMPLED)
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(3))))
    async with aclosing(client.generate(request)) as outputs:
        got = await take(outputs, 3)
        proxy.target = start_engine(make_engine(gate=threading.Semaphore(4)))
        proxy.cut()
        got += await take(outputs, 4)
        proxy.target = start_engine(make_engine())
        proxy.cut()
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
    assert got[-1].finish_reason is FinishReason.LENGTH


async def test_a_prompt_counts_once_however_many_engines_compute_it(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    tallies: list[Tally] = []
    client.on_tally.append(tallies.append)
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(3))))
    async with aclosing(client.generate(make_request())) as outputs:
        await take(outputs, 3)
        proxy.target = start_engine(make_engine())
        proxy.cut()
        await rest(outputs)
    assert sum(tally.num_prompt_tokens for tally in tallies) == len(PROMPT)
    assert sum(len(tally.first) for tally in tallies) == 1


@pytest.mark.parametrize("num_steps", [1, 2, 5])
async def test_prompt_logprobs_are_not_repeated(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine, num_steps: int
) -> None:
    """The prompt takes three steps; the connection is cut during them, or after."""
    gate = threading.Semaphore(num_steps)
    await connect(client, proxy, start_engine(make_engine(max_step_tokens=5, gate=gate)))
    request = make_request(prompt_logprobs=True)
    async with aclosing(client.generate(request)) as outputs:
        async with asyncio.timeout(TIMEOUT_S):
            got = [await anext(outputs) for _ in range(num_steps)]
        proxy.target = start_engine(make_engine(max_step_tokens=4))
        proxy.cut()
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
    logprobs = [value for output in got for value in output.prompt_logprobs]
    expected = [value for output in alone(request) for value in output.prompt_logprobs]
    assert len(logprobs) == len(PROMPT)
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(expected[1:])


async def test_a_request_fails_at_the_third_engine_death(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(0))))
    task = asyncio.create_task(collect(client, make_request()))
    for _ in range(3):
        await asyncio.sleep(0)
        assert not task.done()
        greeting = client.info
        proxy.cut()
        await eventually(lambda greeting=greeting: client.info is not greeting)
    (output,) = await task
    assert output.error == "the engine died too often"
    assert output.finish_reason is None


async def test_the_client_waits_for_an_engine_that_starts_later(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine, tmp_path: Path
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
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine, tmp_path: Path
) -> None:
    await connect(client, proxy, start_engine(make_engine()))
    assert client.is_healthy
    proxy.target = tmp_path / "missing.sock"
    proxy.cut()
    await eventually(lambda: not client.is_healthy)
    assert client.info == INFO


async def test_a_frozen_engine_is_unhealthy(
    client: EngineClient,
    proxy: SocketProxy,
    start_engine: StartEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.generation.engine_client._NOTICE_S", 0.5)
    gate = threading.Semaphore(0)
    await connect(client, proxy, start_engine(make_engine(gate=gate)))
    await eventually(lambda: client.is_healthy)
    task = asyncio.create_task(collect(client, make_request()))
    await eventually(lambda: not client.is_healthy)
    assert client.is_connected
    gate.release(1000)
    await task
    await eventually(lambda: client.is_healthy)


async def test_health_is_what_the_engine_says_of_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.generation.engine_client._NOTICE_S", 60.0)
    engine: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    path = tmp_path / "engine.sock"
    async with await asyncio.start_unix_server(lambda _, writer: engine.put_nowait(writer), path):
        client = EngineClient(path)
        client.start()
        writer = await engine.get()
        writer.write(wire.ready(INFO))
        await eventually(lambda: client.is_healthy)
        writer.write(wire.beat(90.0))
        await eventually(lambda: not client.is_healthy)
        writer.write(wire.beat(0.0))  # a long step: it computes
        await eventually(lambda: client.is_healthy)
        await client.close()
        writer.close()


async def test_a_connection_without_an_engine_is_no_death_of_one(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine, tmp_path: Path
) -> None:
    """As of a process that is ending, whose socket still accepts."""
    request = make_request()
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(2))))
    async with aclosing(client.generate(request)) as outputs:
        got = await take(outputs, 2)
        await proxy.close()
        num_accepted = 0

        def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_accepted
            num_accepted += 1
            writer.transport.abort()

        async with await asyncio.start_unix_server(hang_up, proxy.path):
            await eventually(lambda: num_accepted >= 5)
        proxy.target = start_engine(make_engine())
        await proxy.open()
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
