"""What traces cost: the whole server with and without them, at 32 streams over gRPC and REST.

Two servers on the same random 124 M Llama take turns, one of which sends all its traces by OTLP to
a collector here that only counts bytes; what it takes is part of the cost. A figure is the ratio of
generated tokens per second, with traces by without, and the median over rounds counts: only ratios
of one round are compared, since the machine may be faster in another.

    .venv/bin/python -m benchmarks.tracing

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from benchmarks import machine
from benchmarks.load import Item, Load, generated
from benchmarks.local_server import grpc_stream, http_client, rest_stream, server
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.report import Target, last_line, table, targets_table

NUM_STREAMS = 32
WITHOUT, WITH = "without traces", "with traces"
_GOAL = 0.98
_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"

Stream = Callable[[Item], Awaitable[list[float]]]


class Sink:
    """A collector that counts what it receives."""

    def __init__(self) -> None:
        self.url = ""
        self.num_bytes = 0

    def take(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        """Takes an export; its answer is an empty message."""
        self.num_bytes += len(request)
        return b""


@contextmanager
def sink() -> Iterator[Sink]:
    """A collector for the length of a block."""
    found = Sink()
    handler = grpc.method_handlers_generic_handler(
        _EXPORT, {"Export": grpc.unary_unary_rpc_method_handler(found.take)}
    )
    collector = grpc.server(ThreadPoolExecutor(2))
    collector.add_generic_rpc_handlers((handler,))
    found.url = f"http://127.0.0.1:{collector.add_insecure_port('127.0.0.1:0')}"
    collector.start()
    try:
        yield found
    finally:
        collector.stop(None)


async def rate(stream: Stream, load: Load) -> float:
    """Tokens per second of all streams together."""
    items = load.items(NUM_STREAMS)
    started = time.perf_counter()
    arrivals = await asyncio.gather(*map(stream, items))
    seconds = time.perf_counter() - started
    assert sum(map(len, arrivals)) == generated(items), "a stream lacks tokens"
    return generated(items) / seconds


async def streams(stack: AsyncExitStack, model: Path, *flags: str) -> dict[str, Stream]:
    """Starts a server; returns how to ask it over either face."""
    url, address = await stack.enter_async_context(server(model, *flags))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    client = await stack.enter_async_context(http_client(url))
    return {
        "gRPC": lambda item: grpc_stream(channel, item),
        "REST": lambda item: rest_stream(client, item),
    }


async def measure(model: Path, load: Load, rounds: int) -> dict[str, Any]:
    """Rates by face and by server, one for each round."""
    rates: dict[str, dict[str, list[float]]] = {}
    with sink() as collector:
        async with AsyncExitStack() as stack:
            arms = {
                WITHOUT: await streams(stack, model),
                WITH: await streams(stack, model, f"--otlp-endpoint={collector.url}"),
            }
            for number in tqdm(range(rounds + 1), desc="rounds", file=sys.stderr):
                order = list(arms) if number % 2 else list(arms)[::-1]
                for face in ("gRPC", "REST"):
                    for name in order:
                        found = await rate(arms[name][face], load)
                        if number:  # the first round warms up
                            rates.setdefault(face, {}).setdefault(name, []).append(found)
        return {"tokens_per_second": rates, "exported_bytes": collector.num_bytes}


def ratios(rates: dict[str, list[float]]) -> list[float]:
    """With traces by without, round by round."""
    return [on / off for on, off in zip(rates[WITH], rates[WITHOUT], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round")
    arguments = parser.parse_args()
    config = shrunk(llama_125m()) if arguments.tiny else llama_125m()
    lengths = ((8, 16), (4, 8)) if arguments.tiny else ((32, 128), (32, 96))
    load = Load(*lengths, vocab_size=config.vocab_size)
    rounds = 1 if arguments.tiny else arguments.rounds
    with tempfile.TemporaryDirectory() as directory:
        save(config, Path(directory))
        result = asyncio.run(measure(Path(directory), load, rounds))
    found = result["tokens_per_second"]
    described = machine.describe()
    print(machine.line(described))
    header = ["tokens/s, median", WITHOUT, WITH, "ratio"]
    rows = []
    targets = []
    for face, by_arm in found.items():
        ratio = statistics.median(ratios(by_arm))
        medians = [f"{statistics.median(by_arm[name]):.0f}" for name in (WITHOUT, WITH)]
        rows.append([f"{NUM_STREAMS} streams, {face}", *medians, f"{ratio:.3f}"])
        targets.append(Target(f"{face}, with by without", ratio, _GOAL))
    print(table(header, rows))
    print(targets_table(targets))
    print(last_line({**described, **result}, targets))


if __name__ == "__main__":
    main()
