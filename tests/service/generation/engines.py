"""Real engine servers over a fake model, and a proxy whose connections to them can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path

from engine.engine import Engine
from engine.protocol.request import Request, SamplingParams, SequenceOutput
from service.generation.engine_client import EngineClient
from tests.engine.fakes import make_engine, run, token_ids
from tests.service.fakes import INFO, TIMEOUT_S

PROMPT = tuple(range(1, 14))
GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, seed=2**64 - 3, temperature=1.5, top_p=0.95)

StartEngine = Callable[[Engine], Path]


class SocketProxy:
    """Connects a client to an engine: the connections can be cut and the target replaced."""

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
        """Aborts all connections, as if the engine had died."""
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


async def connect(client: EngineClient, proxy: SocketProxy, path: Path) -> None:
    proxy.target = path
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
    """The outputs until so many tokens were received."""
    taken: list[SequenceOutput] = []
    async with asyncio.timeout(TIMEOUT_S):
        while len(token_ids(taken)) < count:
            taken.append(await anext(outputs))
    return taken


async def rest(outputs: AsyncGenerator[SequenceOutput]) -> list[SequenceOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in outputs]


def alone(request: Request) -> list[SequenceOutput]:
    """The outputs of an engine that is not interrupted and has no other request."""
    return run(make_engine(), request)[request.request_id]
