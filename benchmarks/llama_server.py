"""The server of llama.cpp as a peer: started on a GGUF file, prompted with token ids.

All its caches of prompts are off; keys and values are float32 as ours are, and the sampler is its
cheapest greedy one. It has one slot per stream, each with room for the longest stream.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.load import Item
from benchmarks.local_server import free_port, process


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a stream, their arrival times, and the decoding rate reported by the server."""

    tokens: list[int]
    arrivals: list[float]
    decode_tokens_per_s: float


@asynccontextmanager
async def llama_server(
    binary: Path, model: Path, slots: int, slot_tokens: int, threads: int
) -> AsyncIterator[str]:
    """Runs a `llama-server`; yields its URL."""
    port = free_port()
    command = [
        *(str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--parallel", str(slots), "--ctx-size", str(slots * slot_tokens), "--no-kv-unified"),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--cache-type-k", "f32", "--cache-type-v", "f32"),
        *("--cache-ram", "0", "--slot-prompt-similarity", "0", "--log-disable"),
    ]
    async with process(command, f"http://127.0.0.1:{port}") as url:
        yield url


async def llama_stream(client: httpx.AsyncClient, item: Item) -> Stream:
    """One stream, greedy, to its full length."""
    body = {
        "prompt": item.prompt,
        "n_predict": item.new_tokens,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
        "samplers": ["top_k"],
        "top_k": 1,
    }
    tokens: list[int] = []
    arrivals: list[float] = []
    rate = 0.0
    async with client.stream("POST", "/completion", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            now = time.perf_counter()
            message = json.loads(line.removeprefix("data:"))
            if message["stop"]:
                rate = float(message["timings"]["predicted_per_second"])
                # Pieces of a character are sent with its last one, without their ids.
                arrivals += [now] * (message["tokens_predicted"] - len(arrivals))
            elif message["tokens"]:
                tokens += message["tokens"]
                arrivals += [now] * len(message["tokens"])
    return Stream(tokens, arrivals, rate)
