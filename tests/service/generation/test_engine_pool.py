"""Several engines as one: requests go on elsewhere, and adapters are those of all."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol.request import EngineStats, FinishReason, StepOutput
from service.call_record import begin_record
from service.errors import ErrorKind, ServiceError
from service.generation.engine_client import EngineClient
from service.generation.engine_pool import EnginePool
from tests.engine.fakes import make_engine, token_ids
from tests.service.fakes import INFO, TIMEOUT_S, eventually
from tests.service.generation.engines import (
    GREEDY,
    SAMPLED,
    SocketProxy,
    StartEngine,
    alone,
    make_request,
    rest,
    take,
)

Gate = threading.Semaphore


class Fleet:
    """A pool, and a proxy to each of its engines, which can be cut."""

    def __init__(self, folder: Path, start_engine: StartEngine) -> None:
        self.folder = folder
        self.start_engine = start_engine
        self.proxies: list[SocketProxy] = []
        self.clients: list[EngineClient] = []

    async def open(self, *gates: Gate | None, prefix_affinity: bool = False) -> EnginePool:
        """The pool of engines, each of which computes as many steps as its gate lets through."""
        for number, gate in enumerate(gates):
            proxy = SocketProxy(self.folder / f"proxy{number}.sock")
            proxy.target = self.start_engine(make_engine(gate=gate))
            await proxy.open()
            self.proxies.append(proxy)
            self.clients.append(EngineClient(proxy.path))
        self.pool = EnginePool(self.clients, prefix_affinity=prefix_affinity)
        self.pool.start()
        async with asyncio.timeout(TIMEOUT_S):
            assert await self.pool.ready() == INFO
        await eventually(lambda: all(client.is_healthy for client in self.clients))
        return self.pool

    def kill(self, number: int) -> None:
        """Ends an engine's connection; there is no other engine in its place."""
        self.proxies[number].target = self.folder / "missing.sock"
        self.proxies[number].cut()

    async def revive(self, number: int, gate: Gate | None = None) -> None:
        self.proxies[number].target = self.start_engine(make_engine(gate=gate))
        await eventually(lambda: self.clients[number].is_healthy)

    def busy(self) -> list[int]:
        """The engines that have requests."""
        return [number for number, one in enumerate(self.clients) if one.num_active]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose gate is closed says nothing, and is frozen only where a test says so."""
    monkeypatch.setattr("service.generation.engine_client._NOTICE_S", 600.0)


@pytest.fixture
async def fleet(tmp_path: Path, start_engine: StartEngine) -> AsyncGenerator[Fleet]:
    fleet = Fleet(tmp_path, start_engine)
    yield fleet
    await fleet.pool.close()
    for proxy in fleet.proxies:
        await proxy.close()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_tokens", [1, 5])
async def test_a_stream_goes_on_in_another_engine_when_its_own_dies(
    fleet: Fleet, sampling: object, num_tokens: int
) -> None:
    gates = [Gate(num_tokens), Gate(num_tokens)]
    pool = await fleet.open(*gates)
    request = make_request(sampling=sampling)  # type: ignore[arg-type]
    async with aclosing(pool.generate(request)) as outputs:
        got = await take(outputs, num_tokens)
        (first,) = fleet.busy()
        other = 1 - first
        gates[other].release(1000)
        fleet.kill(first)
        await eventually(lambda: fleet.busy() == [other])
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))
    assert got[-1].finish_reason is FinishReason.LENGTH
    assert fleet.busy() == []


async def test_a_stream_leaves_an_engine_that_does_not_get_on(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = [Gate(3), Gate(3)]
    pool = await fleet.open(*gates)
    request = make_request(sampling=SAMPLED)
    async with aclosing(pool.generate(request)) as outputs:
        got = await take(outputs, 3)
        (first,) = fleet.busy()
        gates[1 - first].release(1000)
        monkeypatch.setattr("service.generation.engine_client._NOTICE_S", 0.5)
        got += await rest(outputs)
        assert fleet.clients[first].is_connected
        gates[first].release(1000)  # what it computes now is nobody's any more
        await eventually(lambda: fleet.clients[first].is_healthy)
    assert token_ids(got) == token_ids(alone(request))
    again = make_request("again")
    async with aclosing(pool.generate(again)) as outputs:
        assert token_ids(await rest(outputs)) == token_ids(alone(again))


async def test_no_request_goes_to_a_dead_engine(fleet: Fleet) -> None:
    pool = await fleet.open(None, None, None)
    fleet.kill(1)
    await eventually(lambda: not fleet.clients[1].is_healthy)
    assert pool.is_healthy
    for number in range(6):
        request = make_request(str(number), prompt_token_ids=(number, 5, 6))
        async with aclosing(pool.generate(request)) as outputs:
            await anext(outputs)
            assert fleet.clients[1].num_active == 0
            await rest(outputs)


async def test_streams_wait_while_all_engines_are_dead_and_take_the_first_that_is_back(
    fleet: Fleet,
) -> None:
    pool = await fleet.open(Gate(2), Gate(2))
    requests = [make_request(str(number), SAMPLED) for number in range(2)]
    streams = [pool.generate(request) for request in requests]
    got = [await take(stream, 2) for stream in streams]
    assert fleet.busy() == [0, 1]
    fleet.kill(0)
    fleet.kill(1)
    await eventually(lambda: not pool.is_healthy)
    with pytest.raises(ServiceError) as refused:
        await anext(pool.generate(make_request("new")))
    assert refused.value.kind is ErrorKind.UNHEALTHY
    await fleet.revive(1)
    for stream, begun, request in zip(streams, got, requests, strict=True):
        assert token_ids(begun + await rest(stream)) == token_ids(alone(request))


async def test_a_request_fails_with_the_third_engine_that_it_may_have_killed(fleet: Fleet) -> None:
    pool = await fleet.open(Gate(0), Gate(0), Gate(0))
    stream = pool.generate(make_request())
    task = asyncio.create_task(anext(stream))
    for _ in range(3):
        await eventually(lambda: len(fleet.busy()) == 1)
        assert not task.done()
        (number,) = fleet.busy()
        client = fleet.clients[number]
        await eventually(lambda client=client: client.unfinished()[0].is_taken)
        fleet.kill(number)
        await eventually(lambda client=client: client.num_active == 0)
    async with asyncio.timeout(TIMEOUT_S):
        assert (await task).error == "the engine died too often"
    await stream.aclose()


async def test_streams_of_engines_that_die_in_one_moment_go_on(fleet: Fleet) -> None:
    """Each is given to engines whose deaths are not noticed yet: more of them than it may kill."""
    pool = await fleet.open(*(Gate(2) for _ in range(4)))
    requests = [make_request(str(number), SAMPLED) for number in range(4)]
    streams = [pool.generate(request) for request in requests]
    got = [await take(stream, 2) for stream in streams]
    assert fleet.busy() == [0, 1, 2, 3]
    for number in range(4):
        fleet.kill(number)
    await eventually(lambda: not any(client.is_connected for client in fleet.clients))
    await fleet.revive(2)
    for stream, begun, request in zip(streams, got, requests, strict=True):
        assert token_ids(begun + await rest(stream)) == token_ids(alone(request))


async def test_an_engine_that_leaves_ends_its_streams_and_gets_no_more(fleet: Fleet) -> None:
    gates = [Gate(2), Gate(2)]
    pool = await fleet.open(*gates)
    request = make_request(sampling=SAMPLED)
    async with aclosing(pool.generate(request)) as outputs:
        got = await take(outputs, 2)
        (first,) = fleet.busy()
        fleet.clients[first].is_leaving = True
        assert pool.is_healthy
        async with aclosing(pool.generate(make_request("next"))) as others:
            await take(others, 2)
            assert [client.num_active for client in fleet.clients] == [1, 1]
        gates[first].release(1000)
        got += await rest(outputs)
    assert token_ids(got) == token_ids(alone(request))


async def test_a_request_that_an_engine_did_not_take_before_it_left_goes_on_in_another(
    fleet: Fleet,
) -> None:
    gates = [Gate(0), Gate(0)]
    pool = await fleet.open(*gates)
    request = make_request(sampling=SAMPLED)
    async with aclosing(pool.generate(request)) as outputs:
        reading = asyncio.create_task(anext(outputs))
        await eventually(lambda: len(fleet.busy()) == 1)
        (first,) = fleet.busy()
        (stream,) = fleet.clients[first].unfinished()
        await eventually(lambda: stream.is_taken)
        stream.is_taken = False
        fleet.clients[first].is_leaving = True
        await eventually(lambda: fleet.busy() == [1 - first])
        gates[1 - first].release(1000)
        got = [await reading, *await rest(outputs)]
    assert token_ids(got) == token_ids(alone(request))
    assert (stream.num_restarts, stream.num_stalls) == (0, 0)


async def test_a_call_is_aborted_in_whichever_engine_it_is(fleet: Fleet) -> None:
    pool = await fleet.open(Gate(1), Gate(1))
    call = begin_record("id")
    streams = [pool.generate(make_request(str(number))) for number in range(2)]
    for stream in streams:
        await take(stream, 1)
    assert fleet.busy() == [0, 1]
    pool.abort(call)
    for stream in streams:
        with pytest.raises(ServiceError, match="ended by Abort"):
            await rest(stream)
    assert fleet.busy() == []


async def test_a_call_is_aborted_whose_tokens_wait_for_their_reader(fleet: Fleet) -> None:
    """The engine is done with it: what nobody has read yet is not sent any more."""
    pool = await fleet.open(Gate(1000))
    call = begin_record("id")
    ended = asyncio.Event()
    outputs = pool.generate(make_request(max_new_tokens=40), ended.set)
    await take(outputs, 1)
    await ended.wait()
    pool.abort(call)
    with pytest.raises(ServiceError, match="ended by Abort"):
        await anext(outputs)


async def test_a_call_that_was_read_to_its_end_cannot_be_aborted(fleet: Fleet) -> None:
    pool = await fleet.open(Gate(1000))
    call = begin_record("id")
    outputs = pool.generate(make_request(max_new_tokens=4))
    await take(outputs, 4)
    pool.abort(call)
    assert await rest(outputs) == []


async def test_a_call_that_was_aborted_before_it_came_here_asks_no_engine(fleet: Fleet) -> None:
    pool = await fleet.open(Gate(1000))
    begin_record("id").is_aborted = True
    with pytest.raises(ServiceError, match="ended by Abort"):
        await rest(pool.generate(make_request(max_new_tokens=4)))
    assert fleet.busy() == []


async def test_prompts_with_a_shared_beginning_share_an_engine(fleet: Fleet) -> None:
    pool = await fleet.open(Gate(1), Gate(1), Gate(1), prefix_affinity=True)
    shared = tuple(range(1, 3 * INFO.block_size + 1))
    streams = [
        pool.generate(make_request(str(number), prompt_token_ids=(*shared, number)))
        for number in range(4)
    ]
    tasks = [asyncio.create_task(anext(stream)) for stream in streams]
    await eventually(lambda: sum(one.num_active for one in fleet.clients) == 4)
    assert sorted(one.num_active for one in fleet.clients) == [0, 0, 4]
    pool.end_streams("enough")
    await asyncio.gather(*tasks)
    for stream in streams:
        await stream.aclose()


async def test_requests_of_other_services_count(fleet: Fleet) -> None:
    pool = await fleet.open(None, None)
    busy = StepOutput(stats=EngineStats(num_running=20))
    for number in range(4):
        for listener in fleet.clients[0].on_step:  # until the engine itself tells more
            listener(busy)
        stream = pool.generate(make_request(str(number)))
        first = await anext(stream)
        assert fleet.busy() in ([1], []), first
        await stream.aclose()


async def test_an_engine_with_another_model_is_not_used(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    pool = await fleet.open(None, None)
    info = fleet.clients[1].info
    assert info is not None
    fleet.clients[1].info = replace(info, dtype="bfloat16", instance="another")
    with caplog.at_level(logging.ERROR):
        for number in range(4):
            stream = pool.generate(make_request(str(number)))
            await anext(stream)
            assert fleet.clients[1].num_active == 0
            await stream.aclose()
    own = "service.generation.engine_pool"
    (line,) = (record.getMessage() for record in caplog.records if record.name == own)
    assert line.startswith("engine 2 is not used: its dtype is bfloat16, and that of the others")


async def test_requests_go_where_they_fit(fleet: Fleet) -> None:
    pool = await fleet.open(None, None)
    info = fleet.clients[0].info
    assert info is not None
    fleet.clients[0].info = replace(info, max_total_tokens=20)
    for number in range(3):
        stream = pool.generate(make_request(str(number)))  # 25 tokens
        await anext(stream)
        assert fleet.clients[0].num_active == 0
        await stream.aclose()
