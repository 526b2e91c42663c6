"""What the processes of a server hold beside the model: after the start, and after a load.

Starts `tokenwire serve` with its Envoy, looks at every process, lets callers ask for a while as
`growth` does, and looks again. Weights and KV cache are counted by loading the same model here.

    .venv/bin/python -m benchmarks.memory
    .venv/bin/python -m benchmarks.memory --model-id model.gguf

The last line is one JSON document. Memory is in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from pathlib import Path

import grpc
import psutil

from benchmarks import held, machine
from benchmarks.growth import Callers
from benchmarks.held import Held
from benchmarks.local_server import http_client, server
from benchmarks.report import last_line, table
from engine.attention.kv_cache import bytes_per_block
from engine.computation.computation import build_computation
from engine.protocol.config import EngineConfig
from service.bundled import demo_model

_GOAL_MIB = 300.0
_CALLERS = 8

Sight = dict[str, Held]  # of all processes, by what they are


def counted(model_id: str) -> tuple[float, float]:
    """MiB of a model's weights as the engine keeps them, and of its KV cache."""
    built = build_computation(EngineConfig(model_id=model_id, socket_path=Path("unused.sock")))
    model = built.model.loaded.model
    tensors = {
        tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
    }
    loaded, form = built.model.loaded, built.bounds.form
    block = bytes_per_block(loaded.layers, built.config.block_size, built.model.cache_dtype, form)
    return sum(tensors.values()) / 2**20, built.runner.cache.num_blocks * block / 2**20


async def look(model: Path, seconds: float) -> tuple[Sight, Sight]:
    """At an idle server, and at the same one after a load."""
    async with (
        server(model) as (url, address),
        http_client(url) as client,
        grpc.aio.insecure_channel(address) as channel,
    ):
        (supervisor,) = psutil.Process().children()
        before = held.by_role(supervisor)
        room = (await client.get("/info")).json()["max_total_tokens"]
        callers = Callers(client, channel, room, share=1.0)
        tasks = [asyncio.create_task(callers.ask_on()) for _ in range(_CALLERS)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return before, held.by_role(supervisor)


def report(before: Sight, after: Sight, weights: float, cache: float) -> str:
    """What each process holds, and what of the engine's is neither weights nor cache."""
    rows = []
    for role, first in before.items():
        last = after[role]
        pairs = ((first.rss, last.rss), (first.pss, last.pss), (first.private, last.private))
        rows.append([role, *(f"{value:.0f}" for pair in pairs for value in pair)])
    header = ["MiB", "RSS", "after a load", "PSS", "after", "private", "after"]
    rest = [sight["engine"].rss - weights - cache for sight in (before, after)]
    lines = [
        table(header, rows),
        f"the engine's weights {weights:.0f}, its cache {cache:.0f}; its RSS beyond them "
        f"{rest[0]:.0f}, after a load {rest[1]:.0f} (goal {_GOAL_MIB:.0f})",
    ]
    return "\n".join(lines)


def main() -> None:
    """Looks and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-id", type=Path, default=demo_model())
    parser.add_argument("--seconds", type=float, default=20.0, help="of load")
    parser.add_argument("--tiny", action="store_true", help="two seconds of load")
    arguments = parser.parse_args()
    seconds = 2.0 if arguments.tiny else arguments.seconds
    described = machine.describe()
    before, after = asyncio.run(look(arguments.model_id, seconds))
    weights, cache = counted(str(arguments.model_id))
    print(f"{machine.line(described)}\n\n{report(before, after, weights, cache)}\n")
    result = {
        "machine": described,
        "weights": weights,
        "cache": cache,
        "before": {role: asdict(item) for role, item in before.items()},
        "after": {role: asdict(item) for role, item in after.items()},
    }
    print(last_line(result, []))


if __name__ == "__main__":
    main()
