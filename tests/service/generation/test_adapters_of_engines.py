"""Adapters of several engines: all have them, or none, whatever callers do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import wire
from engine.protocol.adapters import AdapterInfo, LoadAdapter
from service.generation.engine_client import EngineClient
from service.generation.engine_pool import EnginePool
from tests.service.fakes import INFO, eventually

WANTED = LoadAdapter(name="pirate", source="/pirate")


class Shelf:
    """An engine that does nothing but load adapters, when its gate is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gate = asyncio.Event()
        self.num_asked = 0
        self.names: list[str] = []

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._connected, self.path)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.ready(replace(INFO, instance=self.path.name)))
        with suppress(asyncio.IncompleteReadError):
            while True:
                (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                number, wanted = wire.parse_load(wire.parse(await reader.readexactly(size))[1])
                self.num_asked += 1
                await self.gate.wait()
                self.names.append(wanted.name)
                listed = tuple(AdapterInfo(name, f"/{name}", "0" * 64, 4) for name in self.names)
                writer.write(wire.adapters(listed) + wire.settled(number, None))
        writer.close()


@pytest.fixture
async def shelves(tmp_path: Path) -> AsyncGenerator[list[Shelf]]:
    shelves = [Shelf(tmp_path / f"{number}.sock") for number in range(2)]
    servers = [await shelf.serve() for shelf in shelves]
    yield shelves
    for server in servers:
        server.close()


@pytest.fixture
async def pool(shelves: list[Shelf]) -> AsyncGenerator[EnginePool]:
    clients = [EngineClient(shelf.path) for shelf in shelves]
    pool = EnginePool(clients)
    pool.start()
    await pool.ready()
    await eventually(lambda: all(client.is_healthy for client in clients))
    yield pool
    await pool.close()


async def test_a_caller_who_leaves_while_an_adapter_is_loaded_leaves_it_in_all_engines(
    pool: EnginePool, shelves: list[Shelf]
) -> None:
    first, second = shelves
    call = asyncio.create_task(pool.load_adapter(WANTED))
    await eventually(lambda: first.num_asked == 1)
    assert second.num_asked == 0, "the first engine decides what it is"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    first.gate.set()
    second.gate.set()
    await eventually(lambda: first.names == second.names == ["pirate"])
