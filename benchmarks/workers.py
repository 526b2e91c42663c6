"""What a service process costs and carries: microseconds of its processor per streamed token.

An engine without a model gives every stream a token at each step, in time; supervisor, service
processes and Envoy are those of `tokenwire serve`. Over gRPC (the service's own port), gRPC through
Envoy, and REST, with one and with two service processes, it prints how many tokens arrived, what
each of them took of a processor in the services and in Envoy, and what a bare grpc.aio server takes
that sends messages of the same size at the same times. A process carries as many tokens a second as
fit into a second of its processor.

    .venv/bin/python -m benchmarks.workers

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass

import grpc
import httpx
import psutil
from grpc import aio

from benchmarks import machine, processes
from benchmarks.local_server import METHOD, free_port, http_client, process
from benchmarks.processes import Usage
from benchmarks.report import Target, table, targets_table
from service.pb.tokenwire.v1 import GenerateParameters, GenerateRequest

_GOAL, _REST_GOAL = 1.2, 2.0  # times what a bare server takes
_SETTLE_S = 1.0
_MAX_NEW_TOKENS = 1_000_000  # no stream ends by itself
_PROMPT = "What is Deep Learning?"
_NUM_CHANNELS = 8
_DIRECT, _ENVOY, _REST = "gRPC", "gRPC through Envoy", "REST"

Stream = Callable[["Arrived"], Awaitable[None]]


@dataclass(slots=True)
class Arrived:
    """What has arrived of all streams."""

    num_tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """A point: so many streams over one face.

    Attributes:
        offered: tokens per second that the engine gives.
        arrived: tokens per second that clients have got.
        service_us: processor time of all service processes per token.
        busiest: the part of a processor that the busiest of them used.
        envoy_us: the same of Envoy.
        message_bytes: of a token on the client's side.
    """

    face: str
    workers: int
    streams: int
    offered: float
    arrived: float
    service_us: float
    busiest: float
    envoy_us: float
    message_bytes: float


def request() -> bytes:
    """A request without an end."""
    parameters = GenerateParameters(max_new_tokens=_MAX_NEW_TOKENS)
    return bytes(GenerateRequest(inputs=_PROMPT, parameters=parameters))


async def grpc_stream(channel: aio.Channel, arrived: Arrived) -> None:
    """Counts the messages of a stream until it is cancelled."""
    async for message in channel.unary_stream(METHOD)(request()):
        arrived.num_tokens += 1
        arrived.num_bytes += len(message)


async def rest_stream(client: httpx.AsyncClient, arrived: Arrived) -> None:
    """Counts the events of a stream until it is cancelled."""
    body = {"inputs": _PROMPT, "parameters": {"max_new_tokens": _MAX_NEW_TOKENS}}
    async with client.stream("POST", "/generate_stream", json=body) as reply:
        async for chunk in reply.aiter_raw():
            arrived.num_tokens += chunk.count(b"data:")
            arrived.num_bytes += len(chunk)


@contextlib.asynccontextmanager
async def running(streams: list[Stream], arrived: Arrived) -> AsyncIterator[None]:
    """Streams for the length of a block, once all have begun."""
    tasks = [asyncio.create_task(stream(arrived)) for stream in streams]
    try:
        while arrived.num_tokens < len(streams):
            await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE_S)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def channels(address: str) -> AsyncIterator[list[aio.Channel]]:
    """Several connections, as several clients have."""
    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        yield [
            await stack.enter_async_context(aio.insecure_channel(address, options=options))
            for _ in range(_NUM_CHANNELS)
        ]


async def measure(
    face: str,
    streams: list[Stream],
    services: list[psutil.Process],
    envoy: psutil.Process | None,
    seconds: float,
    interval_s: float,
) -> Figure:
    """A point."""
    arrived, loop = Arrived(), asyncio.get_running_loop()
    async with running(streams, arrived):
        usage = Usage([*services, *([envoy] if envoy else [])])
        begun, before = loop.time(), Arrived(arrived.num_tokens, arrived.num_bytes)
        await asyncio.sleep(seconds)
        passed, used = loop.time() - begun, usage.seconds()
        num_tokens = arrived.num_tokens - before.num_tokens
        num_bytes = arrived.num_bytes - before.num_bytes
    of_services = used[: len(services)]
    return Figure(
        face=face,
        workers=len(services),
        streams=len(streams),
        offered=len(streams) / interval_s,
        arrived=num_tokens / passed,
        service_us=1e6 * sum(of_services) / num_tokens,
        busiest=max(of_services) / passed,
        envoy_us=1e6 * sum(used[len(services) :]) / num_tokens,
        message_bytes=num_bytes / num_tokens,
    )


async def of_server(workers: int, counts: list[int], seconds: float, step_s: float) -> list[Figure]:
    """All points of a server with so many service processes."""
    port, grpc_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "benchmarks.echo_server", str(step_s)),
        *(f"--port={port}", f"--grpc-port={grpc_port}", f"--service-workers={workers}"),
        *("--log-level=warning", "--drain-seconds=1", "--max-concurrent-requests=4096"),
    ]
    url, figures = f"http://127.0.0.1:{port}", []
    async with process(command, url):
        found = processes.by_role()
        services, (envoy,) = found["service"], found["envoy"]
        for face, address in (
            (_DIRECT, f"127.0.0.1:{grpc_port}"),
            (_ENVOY, f"127.0.0.1:{port}"),
        ):
            async with channels(address) as opened:
                for count in counts:
                    streams = [_of_channel(opened[at % len(opened)]) for at in range(count)]
                    through = None if face == _DIRECT else envoy
                    figures.append(await measure(face, streams, services, through, seconds, step_s))
        async with http_client(url) as client:
            for count in counts:
                streams = [lambda arrived: rest_stream(client, arrived)] * count
                figures.append(await measure(_REST, streams, services, envoy, seconds, step_s))
    return figures


def _of_channel(channel: aio.Channel) -> Stream:
    return lambda arrived: grpc_stream(channel, arrived)


async def bare(count: int, num_bytes: int, seconds: float, step_s: float) -> Figure:
    """The point of a server that does nothing but send."""
    port = free_port()
    arguments = (str(port), str(num_bytes), str(step_s))
    command = [sys.executable, "-m", "benchmarks.workers", "--bare", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        await asyncio.to_thread(server.stdout.readline)  # once it listens
        async with channels(f"127.0.0.1:{port}") as opened:
            streams = [_of_channel(opened[at % len(opened)]) for at in range(count)]
            processes = [psutil.Process(server.pid)]
            return await measure("bare grpc.aio", streams, processes, None, seconds, step_s)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


async def serve_bare(port: int, num_bytes: int, step_s: float) -> None:
    """Sends every stream a message at each tick."""
    message, tick = b"x" * num_bytes, asyncio.Event()

    async def send(_: bytes, __: aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        while True:
            await tick.wait()
            yield message
            await asyncio.sleep(0)

    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(send)}
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    next_tick = loop.time()
    while True:
        tick.set()
        tick.clear()  # all that wait now are woken, once
        next_tick = max(next_tick + step_s, loop.time())
        await asyncio.sleep(next_tick - loop.time())


async def run(numbers: list[int], counts: list[int], seconds: float, step_s: float) -> list[Figure]:
    """All points."""
    figures = []
    for workers in numbers:
        figures += await of_server(workers, counts, seconds, step_s)
    num_bytes = round(next(item.message_bytes for item in figures if item.face == _DIRECT))
    return figures + [await bare(count, num_bytes, seconds, step_s) for count in counts]


def ratio(figures: list[Figure], face: str) -> float:
    """What service and Envoy take per token, by what a bare server takes, with most streams."""
    one = [item for item in figures if item.workers == 1]
    (ours,) = (item for item in one if item.face == face and item.streams == _most(one))
    (bare_one,) = (
        item for item in one if item.face.startswith("bare") and item.streams == _most(one)
    )
    return (ours.service_us + ours.envoy_us) / bare_one.service_us


def _most(figures: list[Figure]) -> int:
    return max(item.streams for item in figures)


def cells(item: Figure) -> list[str]:
    """A line of the table."""
    return [
        item.face,
        str(item.workers),
        str(item.streams),
        f"{item.offered:.0f}",
        f"{item.arrived:.0f}",
        f"{item.service_us:.0f}",
        f"{item.busiest:.0%}",
        f"{1e6 * item.workers / item.service_us:.0f}",
        f"{item.envoy_us:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--seconds", type=float, default=3.0, help="per point")
    parser.add_argument("--step", type=float, default=0.02, help="seconds of the engine's step")
    parser.add_argument("--tiny", action="store_true", help="a try-out that takes seconds")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)  # the server of the last rows
    arguments = parser.parse_args()
    if arguments.bare:
        port, num_bytes, step_s = arguments.bare
        asyncio.run(serve_bare(int(port), int(num_bytes), float(step_s)))
        return
    counts, seconds, numbers = arguments.streams, arguments.seconds, [1, 2]
    if arguments.tiny:
        counts, seconds, numbers = [4], 0.5, [1]
    found = machine.describe()
    print(machine.line(found))
    figures = asyncio.run(run(numbers, counts, seconds, arguments.step))
    header = ["", "workers", "streams", "offered/s", "arrived/s", "us/token"]
    header += ["busiest", "carry/s", "Envoy us"]
    print(table(header, [cells(item) for item in figures]))
    targets = [
        Target(f"a token over {face}, by bare grpc.aio", ratio(figures, face), goal, at_least=False)
        for face, goal in ((_DIRECT, _GOAL), (_REST, _REST_GOAL))
    ]
    print(targets_table(targets))
    print(json.dumps({"machine": found, "figures": [asdict(item) for item in figures]}))


if __name__ == "__main__":
    main()
