"""What prefix affinity earns within a server: several engines, and prompts that share beginnings.

Starts `tokenwire serve --replicas` with the bundled model twice, without and with affinity. The
load is that of `benchmarks.servers`: callers stream short answers to prompts of many groups,
through Envoy; those of a group share their first tokens, and all groups together fit into the
caches of all engines, not into that of one. It prints the tokens that were found in a prefix cache,
and the times to the first token.

    .venv/bin/python -m benchmarks.replicas

The last line is one JSON document. Times are in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass

from benchmarks import machine
from benchmarks.local_server import server
from benchmarks.report import percentile, table
from benchmarks.servers import Load, ask, counters, prompts
from service.bundled import demo_model

_WAYS = {"least busy": "false", "beginning": "true"}


@dataclass(frozen=True, slots=True)
class Figure:
    """What one way of choosing an engine did.

    Attributes:
        way: how engines were chosen.
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


async def measure_way(way: str, load: Load) -> Figure:
    """Starts a server and asks everything."""
    flags = (
        f"--replicas={load.num_servers}",
        f"--replica-affinity={_WAYS[way]}",
        "--num-threads=1",
        "--service-workers=1",
        f"--max-batch-total-tokens={load.cache_tokens}",
    )
    async with server(demo_model(), *flags) as (url, _):
        (before,), started = await counters([url]), time.perf_counter()
        found = await ask(url, load, prompts(load, way))
        seconds = time.perf_counter() - started
        (after,) = await counters([url])
    hit_rate = (after["hits"] - before["hits"]) / (after["queries"] - before["queries"])
    return Figure(way, hit_rate, found, len(found) / seconds)


async def measure(load: Load) -> list[Figure]:
    """One figure for each way."""
    return [await measure_way(way, load) for way in _WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2, help="engines")
    parser.add_argument("--groups", type=int, default=16, help="of prompts that begin alike")
    parser.add_argument("--rounds", type=int, default=12, help="prompts of each group")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--prefix", type=int, default=1500, help="tokens that a group shares")
    parser.add_argument("--cache", type=int, default=16_384, help="tokens that an engine keeps")
    parser.add_argument("--tiny", action="store_true", help="a test of this script")
    given = parser.parse_args()
    load = Load(
        given.groups, given.rounds, given.callers, given.prefix, given.cache, given.replicas
    )
    if given.tiny:
        load = Load(2, 4, 1, 100, 2048)
    described = machine.describe()
    figures = asyncio.run(measure(load))
    print(machine.line(described))
    header = ["engine by", "tokens found", "first token p50, ms", "p99", "requests/s"]
    print(table(header, [figure.row() for figure in figures]))
    document = {"machine": described, "load": asdict(load)}
    print(json.dumps({**document, "figures": [asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
