"""Step 5: the whole server over gRPC at 1, 8, 64 and 256 streams, on a random 8B.

Seconds from the start of `tokenwire serve` to its first token, and then for each number of streams:
tokens per second, time to first token, gaps between tokens, and the processor time of each process
per streamed token. Prompts have 1,000 tokens and answers 200; no prefix is shared. The callers are
processes of their own, so that they do not wait for each other.

    python -m benchmarks.gpu.serving

The weights (16 GB) are made on the device and written to a temporary directory, from whose page
cache the server loads them; TMPDIR says where.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch

from benchmarks.gpu import saved_model
from benchmarks.gpu.results import Results, arguments
from benchmarks.load import Item, Load, generated, uniform
from benchmarks.local_engine import gaps
from benchmarks.local_server import grpc_stream, server
from benchmarks.random_model import llama_8b, shrunk
from benchmarks.report import percentile, table

_STREAMS_PER_CALLER = 32  # of a process
_MOST_CALLERS = 8
_CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
_PROCESSES = ("engine", "service", "envoy")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Streams, and tokens of their prompts and answers."""

    streams: tuple[int, ...] = (1, 8, 64, 256)
    prompt: int = 1000
    answer: int = 200
    cache: int | None = None  # tokens; None for all that fit


_SMOKE = Sizes(streams=(1, 4), prompt=12, answer=6, cache=1024)


async def measured(results: Results, config: Any, sizes: Sizes) -> None:
    """Starts the server and runs each number of streams, twice: the better one counts."""
    dtype = "float32" if results.device.type == "cpu" else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder), time.monotonic()
        saved_model.save(config, path, results.device, getattr(torch, dtype))
        results.note("written_s", round(time.monotonic() - started, 1))
        flags = [f"--device={results.device.type}", f"--dtype={dtype}", "--max-total-tokens=2048"]
        flags += ["--max-input-tokens=2047", "--max-concurrent-requests=512"]
        if sizes.cache is not None:
            flags = [flag for flag in flags if "2048" not in flag and "2047" not in flag]
            flags += [f"--max-batch-total-tokens={sizes.cache}", "--max-total-tokens=64"]
            flags += ["--max-input-tokens=63", "--num-threads=1"]
        started = time.perf_counter()
        async with server(path, *flags) as (_, address):
            load = uniform(sizes.prompt, sizes.answer, config.vocab_size)
            first = await asyncio.to_thread(stream, address, uniform(8, 2).items(1))
            results.note("start_to_first_token_s", first[0][0] - started)
            for count in sizes.streams:
                if results.left_s < 60:
                    results.fail(f"{count} streams", "not run: no time left")
                    continue
                with results.part(f"{count} streams"):
                    rounds = [await one_round(address, load, count) for _ in range(2)]
                    best = max(rounds, key=lambda found: found["tokens_per_s"])
                    results.note(f"{count} streams", best)


async def one_round(address: str, load: Load, count: int) -> dict[str, Any]:
    """All streams of a round at once."""
    items, before = load.items(count), processor_s()
    started = time.perf_counter()
    arrivals = await asyncio.to_thread(spread, address, items)
    ended = max(times[-1] for times in arrivals)
    used = {name: seconds - before.get(name, 0.0) for name, seconds in processor_s().items()}
    first = sorted(times[0] - started for times in arrivals)
    between = sorted(gaps(arrivals)) or [0.0]
    num_tokens = generated(items)
    if sum(map(len, arrivals)) < num_tokens:
        raise RuntimeError(f"{sum(map(len, arrivals))} of {num_tokens} tokens arrived")
    return {
        "tokens_per_s": num_tokens / (ended - started),
        "first_token_ms": {p: 1000 * percentile(first, p) for p in (50, 99)},
        "between_tokens_ms": {p: 1000 * percentile(between, p) for p in (50, 99)},
        "processor_us_per_token": {name: 1e6 * s / num_tokens for name, s in used.items()},
    }


def processor_s() -> dict[str, float]:
    """Seconds of processors that each process of the server has used."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words, times = process.cmdline(), process.cpu_times()
        except psutil.Error:
            continue
        names = {Path(word).name for word in words[:6]}
        for name in _PROCESSES:
            if name in names or (name == "envoy" and any("envoy" in word for word in names)):
                found[name] = found.get(name, 0.0) + times.user + times.system
                break
    return found


def spread(address: str, items: Sequence[Item]) -> list[list[float]]:
    """Streams items from several processes; returns the arrival times of each one's tokens."""
    num_callers = min(_MOST_CALLERS, -(-len(items) // _STREAMS_PER_CALLER))
    if num_callers == 1:
        return stream(address, items)
    shares = [items[number::num_callers] for number in range(num_callers)]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_callers, mp_context=fresh) as pool:
        list(pool.map(abs, range(num_callers)))  # started and imported
        found = pool.map(stream, [address] * num_callers, shares)
        return [times for share in found for times in share]


def stream(address: str, items: Sequence[Item]) -> list[list[float]]:
    """Streams items at once from this process; times are those of `time.perf_counter`."""

    async def all_of_them() -> list[list[float]]:
        async with grpc.aio.insecure_channel(address, _CHANNEL) as channel:
            return [*await asyncio.gather(*(grpc_stream(channel, item) for item in items))]

    return asyncio.run(all_of_them())


def main(argv: list[str] | None = None) -> int:
    """Serves and measures; the status is 1 if a part fails."""
    assert __doc__ is not None
    found = arguments(__doc__, argv)
    results = Results("serving", found)
    config = shrunk(llama_8b()) if found.smoke else llama_8b()
    with results.part("server"):
        asyncio.run(measured(results, config, _SMOKE if found.smoke else Sizes()))
    rows = [
        [name, f"{row['tokens_per_s']:.1f}", f"{row['first_token_ms'][50]:.1f}"]
        for name, row in results.parts.items()
        if isinstance(row, dict)
    ]
    print(table(["", "tokens/s", "first token, ms"], rows))
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
