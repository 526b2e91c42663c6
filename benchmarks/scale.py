"""Replicas, service processes and Envoy on this machine, under calls that come when they come.

Starts `tokenwire serve` with each number of replicas and of service processes, and sends calls in
an open loop (Poisson arrivals; latencies count from when a call was due) through Envoy, over REST
and over gRPC with several connections, with the load generator of `tokenwire bench`. It prints
throughput, latencies, and what each kind of process took of the processors while the calls ran:

    .venv/bin/python -m benchmarks.scale --rates 5 20 --workers 1 2

`--echo S` puts an engine without a model in the place of each real one, for what only Envoy and the
service processes take: it gives each of its requests a token every S seconds. The client runs
beside the server, so `sent late` says whether it has kept up. The last line is one JSON document,
of which `benchmarks.simulation.calibrate` makes costs per call and token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine, processes
from benchmarks.local_server import free_port, process
from benchmarks.processes import Usage
from benchmarks.report import table
from service.bench.command import measure_all, prepare
from service.bench.grpc_transport import GrpcTransport
from service.bench.load import RealClock
from service.bench.options import BenchOptions, number, whole_number
from service.bench.rest_transport import RestTransport
from service.bench.summary import Percentiles, Summary, summarise
from service.bench.transport import Task, Transport
from service.client.credentials import Credentials
from service.client.target import Target

_NUM_CONNECTIONS = 8  # of gRPC clients; Envoy's threads divide connections, not calls
_DRAIN_S = 1
_WARM_UP = 8  # calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load on one server.

    Attributes:
        replicas: engines.
        workers: service processes.
        face: the protocol, through Envoy.
        rate: calls per second that were due.
        calls: that were answered.
        tokens: of all answers.
        seconds: from the first call to the last answer's end.
        cpu_s: processor seconds meanwhile, of all processes of a role together.
        busiest: the part of a processor that the busiest process of a role used.
        summary: latencies and failures.
    """

    replicas: int
    workers: int
    face: str
    rate: float
    calls: int
    tokens: int
    seconds: float
    cpu_s: dict[str, float]
    busiest: dict[str, float]
    summary: Summary


class Connections:
    """Transports that take turns, as clients with a connection each do."""

    def __init__(self, transports: list[Transport]) -> None:
        self._transports = transports
        self._turns = itertools.cycle(transports)

    async def token_stops(self, text: str) -> list[int]:
        """See Transport."""
        return await next(self._turns).token_stops(text)

    async def metrics(self) -> str:
        """See Transport."""
        return await next(self._turns).metrics()

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        """See Transport."""
        async with aclosing(next(self._turns).stream(task)) as tokens:
            async for _ in tokens:
                yield

    async def close(self) -> None:
        """See Transport."""
        for transport in self._transports:
            await transport.close()


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Transport]:
    """A client of the server."""
    transport: Transport = (
        RestTransport(target)  # opens connections as it needs them
        if target.transport == "rest"
        else Connections([GrpcTransport(target) for _ in range(_NUM_CONNECTIONS)])
    )
    try:
        yield transport
    finally:
        await transport.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is sent at each point."""

    rates: list[float]
    requests: int
    input_tokens: int
    output_tokens: int

    def options(self, target: Target, rate: float) -> BenchOptions:
        """Of an open loop."""
        return BenchOptions(
            target=target,
            rate=rate,
            concurrency=None,
            requests=self.requests,
            warm_up=_WARM_UP,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            shared_prefix=0,
            seed=0,
            credentials=Credentials(),
            timeout=120.0,
            json=False,
        )


async def measure(replicas: int, workers: int, options: BenchOptions) -> Point:
    """One load, with the processor time from its first call to its last answer."""
    clock = RealClock()
    async with connected(options.target) as transport:
        ready = await prepare(transport, options, clock)
        roles = processes.by_role()
        usage = {role: Usage(found) for role, found in roles.items()}
        samples = await measure_all(transport, options, ready, clock)
        used = {role: watched.seconds() for role, watched in usage.items()}
    summary = summarise(samples, options.output_tokens)
    assert options.rate is not None
    return Point(
        replicas=replicas,
        workers=workers,
        face=options.target.transport,
        rate=options.rate,
        calls=summary.succeeded,
        tokens=summary.generated_tokens,
        seconds=summary.duration_s,
        cpu_s={role: sum(seconds) for role, seconds in used.items()},
        busiest={
            role: max(seconds, default=0.0) / summary.duration_s for role, seconds in used.items()
        },
        summary=summary,
    )


async def of_server(
    replicas: int, workers: int, sizes: Sizes, server: list[str], flags: list[str]
) -> list[Point]:
    """All points of one server, which is a module with its first arguments, and more flags."""
    port, grpc_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", *server, f"--port={port}"),
        *(f"--grpc-port={grpc_port}", "--log-level=warning", "--access-log=false"),
        f"--drain-seconds={_DRAIN_S}",
        f"--service-workers={workers}",
        *([f"--replicas={replicas}"] if replicas > 1 else []),
        *flags,
    ]
    targets = (
        Target(f"http://127.0.0.1:{port}", "rest", secure=False),
        Target(f"grpc://127.0.0.1:{port}", "grpc", secure=False),
    )
    async with process(command, f"http://127.0.0.1:{port}"):
        return [
            await measure(replicas, workers, sizes.options(target, rate))
            for target in targets
            for rate in sizes.rates
        ]


def cells(point: Point) -> list[str]:
    """A line of the table."""
    summary = point.summary
    cores = {role: seconds / point.seconds for role, seconds in point.cpu_s.items()}
    return [
        point.face,
        f"{point.replicas} x {point.workers}",
        f"{point.rate:g}",
        f"{summary.requests_per_s:.1f}",
        f"{summary.output_tokens_per_s:.0f}",
        str(summary.failed),
        *_milliseconds(summary.first_token),
        *_milliseconds(summary.inter_token),
        *(f"{cores[role]:.0%}" for role in ("engine", "service", "envoy")),
        _milliseconds(summary.lateness)[1],
    ]


def _milliseconds(value: Percentiles | None) -> list[str]:
    if value is None:
        return ["-", "-"]
    return [f"{1000 * seconds:.1f}" for seconds in (value.p50, value.p99)]


HEADER = [
    *("", "replicas x workers", "asked/s", "calls/s", "tokens/s", "failed"),
    *("first p50 ms", "p99", "between p50 ms", "p99", "engine", "service", "Envoy"),
    "sent late p99 ms",
]


def as_json(points: list[Point], sizes: Sizes) -> str:
    """For programs; latencies in seconds."""
    found: dict[str, Any] = {"machine": machine.describe(), "sizes": asdict(sizes)}
    return json.dumps({**found, "points": [asdict(point) for point in points]})


async def run(
    numbers: list[tuple[int, int]], sizes: Sizes, server: list[str], flags: list[str]
) -> list[Point]:
    """All points of all servers."""
    found = [await of_server(*number, sizes, server, flags) for number in numbers]
    return [*itertools.chain.from_iterable(found)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count, positive = whole_number(1), number(above=0)
    parser.add_argument("--replicas", type=count, nargs="+", default=[1], help="engines")
    parser.add_argument(
        "--workers", type=count, nargs="+", default=[1, 2], help="service processes"
    )
    parser.add_argument("--rates", type=positive, nargs="+", default=[5, 20], help="calls/s")
    parser.add_argument("--requests", type=count, default=100, help="per point")
    parser.add_argument("--input-tokens", type=count, default=64)
    parser.add_argument("--output-tokens", type=count, default=32)
    parser.add_argument(
        "--echo",
        type=positive,
        metavar="S",
        help="engines without a model, whose steps take so many seconds",
    )
    parser.add_argument("--tiny", action="store_true", help="a try-out that takes seconds")
    parser.add_argument("flags", nargs="*", help="more flags of `tokenwire serve`, after --")
    return parser


def main() -> None:
    given = _parser().parse_args()
    numbers = [*itertools.product(given.replicas, given.workers)]
    sizes = Sizes(
        rates=given.rates,
        requests=given.requests,
        input_tokens=given.input_tokens,
        output_tokens=given.output_tokens,
    )
    if given.tiny:
        numbers, sizes = (
            numbers[:1],
            Sizes(rates=[20], requests=6, input_tokens=16, output_tokens=4),
        )
    print(machine.line(machine.describe()))
    server = ["benchmarks.echo_server", str(given.echo)] if given.echo else ["service.cli", "serve"]
    points = asyncio.run(run(numbers, sizes, server, given.flags))
    print(table(HEADER, [cells(point) for point in points]))
    print(as_json(points, sizes))


if __name__ == "__main__":
    main()
