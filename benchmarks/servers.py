"""What prefix affinity earns: several servers behind one Envoy, and prompts that share beginnings.

Starts servers with the bundled model and, one after the other, a `tokenwire envoy` in front of them
that goes by the fewest requests and one that goes by the beginnings of requests. Callers stream
short answers to prompts of many groups, in random order; those of a group share their first
tokens, and all groups together fit into the caches of all servers, not into that of one. It prints
the tokens that were found in a prefix cache, and the times to the first token.

    .venv/bin/python -m benchmarks.servers

The last line is one JSON document. Times are in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks import machine
from benchmarks.local_server import free_port, http_client, process, server
from benchmarks.report import percentile, table
from service.bundled import demo_model

_WAYS = {"fewest requests": (), "beginning": ("--server-affinity=beginning",)}
_QUESTION_TOKENS = 20
_NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: prompts of groups, so many times each, by so many callers at a time."""

    num_groups: int
    num_rounds: int
    num_callers: int
    prefix_tokens: int
    cache_tokens: int
    num_servers: int = 2


@dataclass(frozen=True, slots=True)
class Figure:
    """What one way of choosing a server, or an engine of one, did.

    Attributes:
        way: how they were chosen.
        hit_rate: the part of the prompts' tokens that was found in a prefix cache.
        first_ms: times to the first token.
        per_second: requests per second, all callers together.
    """

    way: str
    hit_rate: float
    first_ms: list[float]
    per_second: float

    def row(self) -> list[str]:
        """As a row of the table."""
        times = (statistics.median(self.first_ms), percentile(self.first_ms, 99))
        first = [f"{ms:.0f}" for ms in times]
        return [self.way, f"{self.hit_rate:.0%}", *first, f"{self.per_second:.1f}"]


@dataclass(frozen=True, slots=True)
class ServersFigure(Figure):
    """The same of servers; `shares` are the parts of the tokens that each had."""

    shares: list[float]

    def row(self) -> list[str]:
        """As a row of the table."""
        return [*Figure.row(self), " ".join(f"{share:.0%}" for share in self.shares)]


def prompts(load: Load, way: str) -> list[str]:
    """All prompts in the order in which they are sent; those of another way begin differently."""
    source = random.Random(way)

    def digits(num_tokens: int) -> str:
        # Of the bundled model's tokens one is a digit and one a space.
        return " ".join(map(str, source.choices(range(10), k=num_tokens // 2)))

    groups = [digits(load.prefix_tokens) for _ in range(load.num_groups)]
    asked = groups * load.num_rounds
    source.shuffle(asked)
    return [f"{beginning} {digits(_QUESTION_TOKENS)}" for beginning in asked]


async def counters(urls: list[str]) -> list[Counter[str]]:
    """The tokens that each server has looked for in its prefix cache, and found there."""
    found = []
    async with httpx.AsyncClient() as client:
        for url in urls:
            text = (await client.get(f"{url}/metrics")).text
            pairs = re.findall(r"^tokenwire_prefix_cache_(\w+)_total ([\d.e+]+)$", text, re.M)
            found.append(Counter({name: int(float(value)) for name, value in pairs}))
    return found


async def first_ms(client: httpx.AsyncClient, prompt: str) -> float:
    """Milliseconds until a stream's first event."""
    parameters = {"max_new_tokens": _NEW_TOKENS, "ignore_eos": True}
    body = {"inputs": prompt, "parameters": parameters}
    started, elapsed = time.perf_counter(), 0.0
    async with client.stream("POST", "/generate_stream", json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data:") and not elapsed:
                elapsed = 1000 * (time.perf_counter() - started)
                if '"token"' not in line:
                    raise RuntimeError(line)
    return elapsed


async def ask(url: str, load: Load, asked: list[str]) -> list[float]:
    """The times of all prompts, asked by callers that each wait for their answer."""
    waiting, found = iter(asked), list[float]()

    async def caller(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            found.append(await first_ms(client, prompt))

    async with http_client(url) as client:
        await asyncio.gather(*(caller(client) for _ in range(load.num_callers)))
    return found


async def measure_way(way: str, load: Load, addresses: list[str], urls: list[str]) -> ServersFigure:
    """Puts an Envoy in front of the servers and asks everything."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "service.cli", "envoy", f"--port={port}"),
        *(f"--service-addresses={','.join(addresses)}", "--access-log=false", *_WAYS[way]),
    ]
    async with process(command, f"http://127.0.0.1:{port}") as url:
        before, started = await counters(urls), time.perf_counter()
        found = await ask(url, load, prompts(load, way))
        seconds = time.perf_counter() - started
        after = await counters(urls)
    grown = [now - then for now, then in zip(after, before, strict=True)]
    total = sum(grown, Counter[str]())
    shares = [it["queries"] / total["queries"] for it in grown]
    hit_rate = total["hits"] / total["queries"]
    return ServersFigure(way, hit_rate, found, len(found) / seconds, shares)


async def measure(load: Load) -> list[ServersFigure]:
    """One figure for each way."""
    flags = ("--num-threads=1", f"--max-batch-total-tokens={load.cache_tokens}")
    ports = [free_port() for _ in range(load.num_servers)]
    async with AsyncExitStack() as stack:
        started = await asyncio.gather(
            *(
                stack.enter_async_context(server(demo_model(), *flags, f"--gateway-port={port}"))
                for port in ports
            )
        )
        urls, addresses = [url for url, _ in started], [f"127.0.0.1:{port}" for port in ports]
        return [await measure_way(way, load, addresses, urls) for way in _WAYS]


def parser(description: str, noun: str) -> argparse.ArgumentParser:
    """The options of a load."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--groups", type=int, default=16, help="of prompts that begin alike")
    options.add_argument("--rounds", type=int, default=12, help="prompts of each group")
    options.add_argument("--callers", type=int, default=4)
    options.add_argument("--prefix", type=int, default=1500, help="tokens that a group shares")
    options.add_argument("--cache", type=int, default=16_384, help=f"tokens that {noun} keeps")
    options.add_argument("--tiny", action="store_true", help="a test of this script")
    return options


def load_of(given: argparse.Namespace, count: int = 2) -> Load:
    """The load that the options ask for, for so many servers or engines."""
    if given.tiny:
        return Load(2, 4, 1, 100, 2048)
    return Load(given.groups, given.rounds, given.callers, given.prefix, given.cache, count)


def report(
    load: Load,
    measure: Callable[[Load], Coroutine[Any, Any, Sequence[Figure]]],
    noun: str,
    *others: str,
) -> None:
    """Measures, and prints a table and the JSON line; `others` are columns after the usual ones."""
    described = machine.describe()
    figures = asyncio.run(measure(load))
    print(machine.line(described))
    header = [f"{noun} by", "tokens found", "first token p50, ms", "p99", "requests/s", *others]
    print(table(header, [figure.row() for figure in figures]))
    document = {"machine": described, "load": asdict(load)}
    print(json.dumps({**document, "figures": [asdict(figure) for figure in figures]}))


def main() -> None:
    given = parser(__doc__, "a server").parse_args()
    report(load_of(given), measure, "server", "shares")


if __name__ == "__main__":
    main()
