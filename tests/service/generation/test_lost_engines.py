"""Which losses of engines are counted against a request that was in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path

import pytest

from engine.protocol import wire
from service.generation.engine_client import EngineClient
from service.generation.engine_pool import EnginePool
from service.generation.engine_stream import Stream, open_stream
from tests.service.fakes import INFO, TIMEOUT_S, eventually
from tests.service.generation.engines import make_request


@pytest.fixture
def stream() -> Stream:
    """A request that was in an engine which is lost."""
    stream = open_stream(make_request(), lambda: None)
    assert stream.lose_engine(0.0), "the first one counts, whatever it has said"
    return stream


def test_an_engine_lost_in_the_same_moment_says_nothing_of_a_request(stream: Stream) -> None:
    assert not stream.lose_engine(stream.lost_at - 1)
    assert not stream.lose_engine(stream.lost_at - 1)


def test_an_engine_that_has_taken_the_request_counts(stream: Stream) -> None:
    stream.is_taken = True
    assert stream.lose_engine(stream.lost_at - 1)
    assert not stream.lose_engine(stream.lost_at - 1), "the next one has not taken it yet"


def test_an_engine_seen_since_the_last_loss_counts(stream: Stream) -> None:
    assert stream.lose_engine(stream.lost_at + 1)


class _Mortal:
    """An engine that ends with the first request it reads, and comes back at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_deaths = 0

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._connected, self.path)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.ready(INFO))
        with suppress(ConnectionResetError):
            self.num_deaths += len(await reader.read(1))
        writer.transport.abort()


@pytest.fixture
async def mortals(tmp_path: Path) -> AsyncGenerator[list[_Mortal]]:
    engines = [_Mortal(tmp_path / f"{number}.sock") for number in range(3)]
    servers = [await engine.serve() for engine in engines]
    yield engines
    for server in servers:
        server.close()


async def test_a_request_that_ends_engines_before_they_say_so_fails_too(
    mortals: list[_Mortal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that came back since the last loss counts, so none ends more than three times."""
    monkeypatch.setattr("service.generation.engine_client._NOTICE_S", 600.0)  # these never beat
    clients = [EngineClient(engine.path) for engine in mortals]
    pool = EnginePool(clients, prefix_affinity=False)
    pool.start()
    await pool.ready()
    await eventually(lambda: all(client.is_healthy for client in clients))
    outputs = pool.generate(make_request())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert (await anext(outputs)).error == "the engine died too often"
        assert all(engine.num_deaths <= 3 for engine in mortals)
    finally:
        await outputs.aclose()
        await pool.close()
