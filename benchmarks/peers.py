"""The engine and the server on the CPU against peers, on one model with one load.

All have the same random 124 M Llama in float32, the same number of threads and the same lengths of
prompts and answers, which differ within a batch. They take turns, and the best round counts:

* `transformers.generate`, static batches, padded;
* continuous batching of transformers (slow: only in the first rounds);
* the server of llama.cpp with one slot per stream (first built from source, ten minutes);
* the engine alone, in this process;
* the whole server, over gRPC and over REST.

Figures are generated tokens per second of wall clock, prefill included, counting only the tokens
that were requested; for a single stream also the rate of decoding alone. A peer that is not
available is listed as absent, with the reason. Run it on a quiet machine; it takes about twelve
minutes:

    .venv/bin/python -m benchmarks.peers

With `--gguf FILE` all run that file instead, as real models come: llama.cpp on its quantised
weights, transformers on what it dequantises of them, and the engine both on those and on its own
8 bits. The whole server is left out then, whose prompts are words of the random model.

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from tqdm import tqdm

from benchmarks import gguf_file, machine, transformers_peers
from benchmarks.llama_build import PeerAbsentError, server_binary
from benchmarks.llama_server import llama_server, llama_stream
from benchmarks.load import Item, Load, generated, uniform
from benchmarks.local_engine import LocalEngine
from benchmarks.local_server import grpc_stream, http_client, rest_stream, server
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.report import Target, last_line, table, targets_table
from engine.protocol.config import EngineConfig

GENERATE, CONTINUOUS = "transformers generate", "transformers continuous batching"
LLAMA, ALONE = "llama.cpp server", "engine alone"
ALONE_INT8 = "engine alone, int8"
OVER_GRPC, OVER_REST = "server, gRPC", "server, REST"
_CHECKED = 32  # greedy tokens that are compared between peers


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of a load, and the arrival times of its first stream where they are known."""

    seconds: float
    arrivals: Sequence[float] = ()

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first token."""
        if len(self.arrivals) < 2:
            return None
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])


Arm = Callable[[list[Item]], Awaitable[Outcome]]


@dataclass(slots=True)
class Results:
    """The best of all rounds, by the name of the arm."""

    rates: dict[str, dict[int, float]] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, int] = field(default_factory=dict)

    def note(self, arm: str, items: list[Item], outcome: Outcome) -> None:
        """Records an outcome."""
        rates, count = self.rates.setdefault(arm, {}), len(items)
        rates[count] = max(rates.get(count, 0.0), generated(items) / outcome.seconds)
        if count == 1 and outcome.decode_rate is not None:
            self.decode[arm] = max(self.decode.get(arm, 0.0), outcome.decode_rate)

    def note_first(self, arm: str, seconds: float) -> None:
        """Records a time to the first token."""
        self.first_token_s[arm] = min(self.first_token_s.get(arm, seconds), seconds)

    def ratio(self, arm: str, peer: str, count: int) -> float | None:
        """How many times as fast as a peer an arm is."""
        ours, theirs = self.rates[arm].get(count), self.rates.get(peer, {}).get(count)
        return None if ours is None or theirs is None else ours / theirs


class Peers:
    """All arms that are available, ready to run.

    Args:
        model: the model of transformers.
        path: the directory that it is saved in, or its GGUF file.
        load: makes the requests.
        counts: numbers of streams.
    """

    def __init__(self, model: Any, path: Path, load: Load, counts: Sequence[int]) -> None:
        self.results = Results()
        self._model, self._path, self._load, self._counts = model, path, load, counts
        self._warm_up = uniform(8, 2, model.config.vocab_size)
        self._alone: LocalEngine | None = None
        self._int8: LocalEngine | None = None
        self._llama: dict[int, httpx.AsyncClient] = {}
        self._grpc: grpc.aio.Channel | None = None
        self._rest: httpx.AsyncClient | None = None

    async def start(self, stack: AsyncExitStack, without: Sequence[str]) -> None:
        """Starts the engine and the servers; they end with the stack."""
        config = EngineConfig(model_id=str(self._path), socket_path=Path("unused.sock"))
        self._alone = LocalEngine.build(config)
        if self._path.is_file():
            self._int8 = LocalEngine.build(replace(config, quantize="int8"))
            self.results.absent["server"] = "its prompts are words of the random model"
        elif "server" not in without:
            url, address = await stack.enter_async_context(server(self._path))
            self._grpc = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            self._rest = await stack.enter_async_context(http_client(url))
        if "llama.cpp" in without:
            self.results.absent[LLAMA] = "switched off"
            return
        try:
            await self._start_llama(stack)
        except (PeerAbsentError, RuntimeError, TimeoutError) as error:
            self.results.absent[LLAMA] = str(error)

    async def check(self) -> None:
        """Records how many greedy tokens of each arm agree with `generate` of transformers."""
        item = uniform(48, _CHECKED, self._model.config.vocab_size).items(1)[0]
        _, (expected,) = transformers_peers.generate(self._model, [item])
        assert self._alone is not None
        found = {ALONE: next(iter(self._alone.run([item]).tokens.values()))}
        if self._llama:
            stream = await llama_stream(next(iter(self._llama.values())), item)
            found[LLAMA] = stream.tokens
        for arm, tokens in found.items():
            pairs = zip(expected, tokens, strict=False)
            differing = [at for at, (left, right) in enumerate(pairs) if left != right]
            self.results.agreement[arm] = min([*differing, len(tokens)])

    async def round(self, continuous: bool, bar: tqdm[Any]) -> None:
        """Runs every arm once at every number of streams."""
        for count in self._counts:
            arms = self._arms(count) | ({CONTINUOUS: self._run_continuous} if continuous else {})
            for name, arm in arms.items():
                bar.set_description(f"{name}, {count}")
                items = self._load.items(count)
                outcome = await self._outcome(name, arm, items)
                if outcome is not None:
                    self.results.note(name, items, outcome)
                bar.update()
        await self._first_tokens()

    def num_runs(self, rounds: int, continuous: int) -> int:
        """The number of runs in `rounds`, of which `continuous` have continuous batching."""
        return sum(rounds * len(self._arms(count)) + continuous for count in self._counts)

    async def _outcome(self, name: str, arm: Arm, items: list[Item]) -> Outcome | None:
        """The outcome of an arm; None if a peer failed, which is then listed as absent."""
        try:
            return await arm(items)
        except Exception as error:
            if name in (ALONE, ALONE_INT8, OVER_GRPC, OVER_REST):
                raise
            self.results.absent[f"{name}, {len(items)}"] = repr(error)[:300]
            return None

    def _arms(self, count: int) -> dict[str, Arm]:
        """The available arms for this number of streams, without continuous batching."""
        arms: dict[str, Arm] = {GENERATE: self._run_generate, ALONE: self._run_alone}
        if self._int8 is not None:
            arms[ALONE_INT8] = self._run_int8
        if count in self._llama:
            arms[LLAMA] = self._run_llama
        if self._grpc is not None:
            arms |= {OVER_GRPC: self._run_grpc, OVER_REST: self._run_rest}
        return arms

    async def _start_llama(self, stack: AsyncExitStack) -> None:
        """Starts a server of llama.cpp for each number of streams."""
        binary, path = server_binary(), self._path
        if not path.is_file():
            path = path / "model.gguf"
            gguf_file.write(self._model, path)
        threads, room = torch.get_num_threads(), self._load.max_tokens
        for count in self._counts:
            url = await stack.enter_async_context(
                llama_server(binary, path, count, max(room, 48 + _CHECKED) + 8, threads)
            )
            self._llama[count] = await stack.enter_async_context(http_client(url))

    async def _run_generate(self, items: list[Item]) -> Outcome:
        seconds, _ = transformers_peers.generate(self._model, items)
        return Outcome(seconds)

    async def _run_alone(self, items: list[Item]) -> Outcome:
        return _engine_outcome(self._alone, items)

    async def _run_int8(self, items: list[Item]) -> Outcome:
        return _engine_outcome(self._int8, items)

    async def _run_llama(self, items: list[Item]) -> Outcome:
        client = self._llama[len(items)]
        started = time.perf_counter()
        streams = await asyncio.gather(*(llama_stream(client, item) for item in items))
        return _outcome(started, items, [stream.arrivals for stream in streams])

    async def _run_grpc(self, items: list[Item]) -> Outcome:
        started = time.perf_counter()
        streams = await asyncio.gather(*(grpc_stream(self._grpc, item) for item in items))
        return _outcome(started, items, streams)

    async def _run_rest(self, items: list[Item]) -> Outcome:
        assert self._rest is not None
        client, started = self._rest, time.perf_counter()
        streams = await asyncio.gather(*(rest_stream(client, item) for item in items))
        return _outcome(started, items, streams)

    async def _run_continuous(self, items: list[Item]) -> Outcome:
        load = self._load
        limits = (load.prompt_tokens[1], load.new_tokens[1], len(items))
        with transformers_peers.continuous(self._model, *limits) as manager:
            transformers_peers.run_continuous(manager, self._warm_up.items(1))
            seconds, _ = transformers_peers.run_continuous(manager, items)
        return Outcome(seconds)

    async def _first_tokens(self) -> None:
        """First tokens of a single prompt on idle peers, and the bare forward of transformers."""
        load = uniform(self._load.prompt_tokens[1], 2, self._model.config.vocab_size)
        with torch.inference_mode():
            ids = torch.tensor([load.items(1)[0].prompt])
            started = time.perf_counter()
            self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self.results.note_first("transformers forward", time.perf_counter() - started)
        for name, arm in self._arms(1).items():
            if name != GENERATE:
                started = time.perf_counter()
                outcome = await arm(load.items(1))
                self.results.note_first(name, outcome.arrivals[0] - started)


def _engine_outcome(engine: LocalEngine | None, items: list[Item]) -> Outcome:
    assert engine is not None
    run = engine.run(items)
    return Outcome(run.seconds, next(iter(run.arrivals.values())))


def _outcome(started: float, items: list[Item], streams: Sequence[list[float]]) -> Outcome:
    """The outcome of streams that ended now; each must have all its tokens."""
    seconds = time.perf_counter() - started
    for item, arrivals in zip(items, streams, strict=True):
        if len(arrivals) != item.new_tokens:
            raise RuntimeError(f"a stream gave {len(arrivals)} of {item.new_tokens} tokens")
    return Outcome(seconds, streams[0])


def targets(results: Results, counts: Sequence[int]) -> list[Target]:
    """The targets that this script measures."""
    ours = OVER_GRPC if OVER_GRPC in results.rates else ALONE
    theirs, decode = results.decode.get(LLAMA), results.decode
    found = [
        Target(
            f"{arm} / {LLAMA}, 1 stream, decoding", None if theirs is None else rate / theirs, 1.0
        )
        for arm, rate in decode.items()
        if arm != LLAMA
    ]
    for count in (count for count in counts if count > 1):
        for arm in dict.fromkeys((ALONE, ours)):
            found += [
                Target(f"{arm} / {peer}, {count} streams", results.ratio(arm, peer, count), goal)
                for peer, goal in ((GENERATE, 1.5), (CONTINUOUS, 4.0), (LLAMA, 1.0))
            ]
    return found


def report(results: Results, counts: Sequence[int]) -> str:
    """All tables as text."""
    base = results.rates[GENERATE]
    rows = []
    for arm, rates in results.rates.items():
        cells = [
            f"{rates[n]:.1f} ({rates[n] / base[n]:.2f} x)" if n in rates else "-" for n in counts
        ]
        decode = f"{results.decode[arm]:.1f}" if arm in results.decode else "-"
        first = results.first_token_s.get(arm)
        rows.append([arm, *cells, decode, "-" if first is None else f"{first * 1000:.0f}"])
    header = ["tokens/s (x generate)", *map(str, counts), "1, decoding", "first token, ms"]
    bare = results.first_token_s["transformers forward"] * 1000
    lines = [
        table(header, rows),
        f"the bare forward of transformers for the prompt of the first token: {bare:.0f} ms",
        *(f"absent: {arm}: {reason}" for arm, reason in results.absent.items()),
        *(
            f"{arm}: {count} of {_CHECKED} greedy tokens are those of transformers"
            for arm, count in results.agreement.items()
        ),
        "",
        targets_table(targets(results, counts)),
    ]
    return "\n".join(lines)


async def measure(arguments: argparse.Namespace) -> tuple[Results, Load]:
    """Runs all arms in turns."""
    prompts, answers = arguments.prompts, arguments.answers
    if arguments.tiny:
        prompts, answers = (8, 24), (3, 9)
    async with AsyncExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.gguf is None:
            model = save(shrunk(llama_125m()) if arguments.tiny else llama_125m(), path)
        else:
            path, model = arguments.gguf, transformers_peers.load_gguf(arguments.gguf)
        load = Load(tuple(prompts), tuple(answers), model.config.vocab_size)
        peers = Peers(model, path, load, arguments.counts)
        await peers.start(stack, arguments.without)
        await peers.check()
        rounds, slow = arguments.repeat, min(arguments.repeat, arguments.slow_repeat)
        with tqdm(total=peers.num_runs(rounds, slow), file=sys.stderr) as bar:
            for number in range(rounds):
                await peers.round(number < slow, bar)
    return peers.results, load


def options_from_command_line() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--repeat", type=int, default=3, help="rounds; the best counts")
    add("--slow-repeat", type=int, default=1, help="rounds with continuous batching")
    add("--counts", type=int, nargs="+", default=[1, 8, 32], help="numbers of streams")
    add("--prompts", type=int, nargs=2, default=(32, 224), help="shortest and longest, tokens")
    add("--answers", type=int, nargs=2, default=(16, 112), help="shortest and longest, tokens")
    add("--without", nargs="*", default=[], choices=["server", "llama.cpp"], help="leave out")
    add("--gguf", type=Path, help="run this file instead of a random model")
    add("--tiny", action="store_true", help="only to see that everything runs")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = options_from_command_line()
    described = machine.describe()
    results, load = asyncio.run(measure(arguments))
    described["threads"] = torch.get_num_threads()
    print(f"\n{machine.line(described)}\n\n{report(results, arguments.counts)}\n")
    result = {
        "machine": described,
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "tokens_per_second": results.rates,
        "decode_tokens_per_second": results.decode,
        "first_token_s": results.first_token_s,
        "absent": results.absent,
        "agreement": results.agreement,
    }
    print(last_line(result, targets(results, arguments.counts)))


if __name__ == "__main__":
    main()
