"""The engine on the CPU against transformers, and what the transports cost on top of it.

One run measures, on the same random 124 M Llama in float32 with the same threads:

* plain `transformers.generate`, static batches of 1, 8 and 32;
* transformers' own continuous batching with as many requests;
* the engine alone (the step loop in this process);
* the whole server, over gRPC and over REST, with as many concurrent streams;
* the time to first token of an idle server against the bare forward of the prompt.

Figures are generated tokens per second of wall clock, prefill included; the best of `--repeat`
rounds, which take turns so that a disturbance hits everybody. Run it on a quiet machine:

    .venv/bin/python -m benchmarks.engine_cpu

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
import transformers
from tqdm import tqdm

from benchmarks.random_model import llama_125m, prompt, save
from engine.build import build_engine
from engine.config import EngineConfig
from engine.request import Request
from service.pb.tokenwire.v1 import GenerateParameters, GenerateRequest

CONCURRENCY = (1, 8, 32)
METHOD = "/tokenwire.v1.TextGenerationService/GenerateStream"


class Load:
    """What each of the concurrent streams asks for."""

    def __init__(self, prompt_tokens: int, new_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self._salts = itertools.count()

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts that nobody has seen, so that no prefix cache helps."""
        return [prompt(self.prompt_tokens, next(self._salts)) for _ in range(count)]

    def rate(self, count: int, seconds: float) -> float:
        """Generated tokens per second."""
        return count * self.new_tokens / seconds


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def run_generate(model: Any, load: Load, count: int) -> float:
    """transformers.generate on a static batch."""
    ids = torch.tensor(load.prompts(count))
    seconds = timed(
        lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=load.new_tokens,
            min_new_tokens=load.new_tokens,
            do_sample=False,
        )
    )
    return load.rate(count, seconds)


def run_continuous(model: Any, load: Load, count: int) -> float | None:
    """Continuous batching of transformers; None when it does not run here."""
    config = transformers.GenerationConfig(
        max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    try:
        inputs = load.prompts(count)
        seconds = timed(lambda: model.generate_batch(inputs=inputs, generation_config=config))
    except Exception as error:  # a peer that cannot be had is reported as absent
        print(f"transformers continuous batching: {error!r}"[:300], file=sys.stderr)
        return None
    return load.rate(count, seconds)


class EngineAlone:
    """The step loop, in this process."""

    def __init__(self, model_path: Path) -> None:
        config = EngineConfig(model_id=str(model_path), socket_path=model_path / "unused.sock")
        self.engine, self.info = build_engine(config)
        self._ids = itertools.count()

    def run(self, load: Load, count: int) -> float:
        """Tokens per second of `count` requests at once."""
        requests = [
            Request(
                request_id=f"{next(self._ids)}",
                prompt_token_ids=tuple(ids),
                max_new_tokens=load.new_tokens,
            )
            for index, ids in enumerate(load.prompts(count))
        ]

        def work() -> None:
            for request in requests:
                self.engine.add(request)
            while self.engine.has_work:
                self.engine.step()

        return load.rate(count, timed(work))


@asynccontextmanager
async def server(model_path: Path) -> AsyncIterator[tuple[str, str]]:
    """A running `tokenwire serve`; its REST URL and its gRPC address."""
    port, grpc_port = free_port(), free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "service.cli", "serve"),
            *(f"--model-id={model_path}", f"--port={port}", "--log-level=warning"),
        ],
        env={**os.environ, "TOKENWIRE_GRPC_PORT": str(grpc_port)},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await asyncio.to_thread(wait_until_ready, url, process)
        yield url, f"127.0.0.1:{grpc_port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Polls /health."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError("the server did not start")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError("the server is not ready")


def words(ids: list[int]) -> str:
    """The text of a prompt."""
    return " ".join(f"w{index}" for index in ids)


async def grpc_stream(channel: grpc.aio.Channel, ids: list[int], new_tokens: int) -> list[float]:
    """Arrival times of one native stream."""
    request = GenerateRequest(
        inputs=words(ids), parameters=GenerateParameters(max_new_tokens=new_tokens)
    )
    call = channel.unary_stream(METHOD, None, None)(bytes(request))
    return [time.perf_counter() async for _ in call]


async def rest_stream(client: httpx.AsyncClient, ids: list[int], new_tokens: int) -> list[float]:
    """Arrival times of one REST stream."""
    body = {"inputs": words(ids), "parameters": {"max_new_tokens": new_tokens}}
    arrivals = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                arrivals.append(time.perf_counter())
    return arrivals


async def run_grpc(address: str, load: Load, count: int) -> float:
    """Tokens per second of concurrent native streams."""
    async with grpc.aio.insecure_channel(address) as channel:
        started = time.perf_counter()
        streams = [grpc_stream(channel, ids, load.new_tokens) for ids in load.prompts(count)]
        arrivals = await asyncio.gather(*streams)
        assert all(len(times) == load.new_tokens for times in arrivals)
        return load.rate(count, time.perf_counter() - started)


async def run_rest(url: str, load: Load, count: int) -> float:
    """Tokens per second of concurrent REST streams."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        started = time.perf_counter()
        streams = [rest_stream(client, ids, load.new_tokens) for ids in load.prompts(count)]
        arrivals = await asyncio.gather(*streams)
        assert all(len(times) == load.new_tokens for times in arrivals)
        return load.rate(count, time.perf_counter() - started)


async def first_token(address: str, load: Load) -> float:
    """Milliseconds from the request to its first token, on an idle server, over gRPC."""
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        started = time.perf_counter()
        arrivals = await grpc_stream(channel, load.prompts(1)[0], 2)
        return (arrivals[0] - started) * 1000


@torch.inference_mode()
def bare_forward(model: Any, load: Load) -> float:
    """Milliseconds of the model's forward for a prompt, logits of the last token only."""
    ids = torch.tensor(load.prompts(1))
    return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)) * 1000


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All arms, in turns."""
    load = Load(arguments.prompt_tokens, arguments.new_tokens)
    best: dict[str, dict[int, float]] = {}
    first: dict[str, list[float]] = {"forward": [], "server": []}

    def note(arm: str, count: int, rate: float | None) -> None:
        if rate is not None:
            arms = best.setdefault(arm, {})
            arms[count] = max(arms.get(count, 0.0), rate)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        model = save(llama_125m(), path)
        alone = EngineAlone(path)
        async with server(path) as (url, address):
            for _ in tqdm(range(arguments.repeat), desc="rounds", file=sys.stderr):
                for count in CONCURRENCY:
                    note("transformers generate", count, run_generate(model, load, count))
                    note("engine alone", count, alone.run(load, count))
                    note("server, gRPC", count, await run_grpc(address, load, count))
                    note("server, REST", count, await run_rest(url, load, count))
                first["forward"].append(bare_forward(model, load))
                first["server"].append(await first_token(address, load))
        if not arguments.skip_continuous:
            for count in CONCURRENCY:
                note("transformers continuous batching", count, run_continuous(model, load, count))
    return {
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "tokens_per_second": best,
        "first_token_ms": {arm: min(times) for arm, times in first.items()},
    }


def report(result: dict[str, Any]) -> None:
    """A table of rates and of ratios to transformers.generate, and the JSON line."""
    base = result["tokens_per_second"]["transformers generate"]
    print(f"\n{'tokens/s (x transformers generate)':36}" + "".join(f"{n:>18}" for n in CONCURRENCY))
    for arm, rates in result["tokens_per_second"].items():
        cells = [f"{rates[n]:9.1f} ({rates[n] / base[n]:4.2f}x)" for n in CONCURRENCY if n in rates]
        print(f"{arm:36}" + "".join(f"{cell:>18}" for cell in cells))
    times = result["first_token_ms"]
    ratio = times["server"] / times["forward"]
    print(
        f"first token: server {times['server']:.1f} ms, bare forward {times['forward']:.1f} ms: "
        f"{ratio:.2f}x\n"
    )
    print(json.dumps(result))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip-continuous", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = asyncio.run(measure(arguments))
    result["machine"] = {
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    report(result)


if __name__ == "__main__":
    main()
