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

import time

from benchmarks.local_server import server
from benchmarks.servers import Figure, Load, ask, counters, load_of, parser, prompts, report
from service.bundled import demo_model

_WAYS = {"least busy": "false", "beginning": "true"}


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
    options = parser(__doc__, "an engine")
    options.add_argument("--replicas", type=int, default=2, help="engines")
    given = options.parse_args()
    report(load_of(given, given.replicas), measure, "engine")


if __name__ == "__main__":
    main()
