"""The engine on the CPU against its targets and the ceilings of the machine: memory, arithmetic.

One run measures, on a random 124 M Llama in float32:

* the ceilings: memory read by the same number of threads, and matrix products of the shapes of a
  prefill;
* decoding at 1, 8 and 32 rows, as a share of the roofline: every few steps, the size of the weights
  is read from memory, whose speed may double from one second to the next on a virtual machine;
* prefill, as a share of the rate of matrix products;
* what a step at 32 rows costs apart from the forward;
* the time to the first token of a second request with the same long prefix;
* the time between tokens of running streams while long prompts arrive, computed whole and in
  chunks.

Ceilings and figures are measured in turns, so that a disturbance affects both; the best round
counts, for shares of the roofline the median. Run it on a quiet machine; it takes about four
minutes:

    .venv/bin/python -m benchmarks.engine_cpu

Peers are in `benchmarks.peers`. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.ceilings import Reader, matmul_rate
from benchmarks.load import Item, uniform
from benchmarks.local_engine import LocalEngine, Run, gaps, median_seconds
from benchmarks.model_costs import ModelCosts, costs
from benchmarks.random_model import llama_125m, prompt, save, shrunk
from benchmarks.report import Target, last_line, percentile, table, targets_table
from engine.protocol.config import EngineConfig

CPU = torch.device("cpu")
BATCHES = (1, 8, 32)
_STEPS_PER_READ = 4  # decode steps for each measurement of memory
_FIRST_SALT = 1_000_000  # for prompts outside loads, whose salts count from 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of what is measured, in tokens unless it says otherwise."""

    prompt: int = 128
    answer: int = 64
    prefill: tuple[int, ...] = (512, 2048)
    prefix: int = 2048
    suffix: int = 16
    long_prompt: int = 3000
    num_long: int = 3  # prompts
    stream_answer: int = 150
    gemm_rows: tuple[int, ...] = (512, 2048)  # rows of matrix products


TINY = Sizes(
    prompt=16,
    answer=6,
    prefill=(32,),
    prefix=96,
    suffix=4,
    long_prompt=80,
    num_long=1,
    stream_answer=12,
    gemm_rows=(64,),
)


@dataclass(slots=True)
class Best:
    """The best of all rounds."""

    read_bandwidth: float = 0.0  # bytes/s
    matmul_rate: float = 0.0  # flop/s
    step_s: dict[int, dict[str, float]] = field(default_factory=dict)  # batch -> part -> seconds
    shares: dict[int, list[float]] = field(default_factory=dict)  # batch -> each step's of the roof
    prefill_s: dict[int, float] = field(default_factory=dict)  # prompt tokens -> seconds
    prefix_s: dict[str, float] = field(default_factory=dict)  # first and second request


class Bench:
    """All measurements on one engine.

    Args:
        config: configuration of the model.
        engine: computes a whole prompt in one step.
        chunked: computes long prompts in chunks.
        sizes: sizes of what is measured.
    """

    def __init__(
        self, config: Any, engine: LocalEngine, chunked: LocalEngine, sizes: Sizes
    ) -> None:
        self.costs: ModelCosts = costs(config, torch.float32)
        self.best = Best()
        self._config = config
        self._engine = engine
        self._chunked = chunked
        self._sizes = sizes
        self._load = uniform(sizes.prompt, sizes.answer, config.vocab_size)
        self._salt = _FIRST_SALT
        self._reader = Reader(self.costs.weight_bytes, CPU)

    def round(self) -> None:
        """Measures everything once, except for the long prompts."""
        self._ceilings()
        for batch in BATCHES:
            self._decode(batch)
        for length in self._sizes.prefill:
            self._prefill(length)
        self._prefix()
        self._ceilings()

    def stalls(self) -> dict[str, dict[str, float]]:
        """Milliseconds between tokens of running streams, and to first tokens of long prompts."""
        num_long = self._sizes.num_long
        arms = {
            "no long prompts": (self._engine, 0),
            "prompts computed whole": (self._engine, num_long),
            "prompts computed in chunks": (self._chunked, num_long),
        }
        bar = tqdm(arms.items(), desc="long prompts", file=sys.stderr)
        return {name: self._streams(*arm) for name, arm in bar}

    def roofline_s(self, batch: int, bandwidth: float) -> float:
        """The least seconds of a decode step, limited by memory or by arithmetic."""
        context = self._sizes.prompt + self._sizes.answer / 2
        by_memory = self.costs.decode_bytes(batch, context) / bandwidth
        by_arithmetic = self.costs.decode_flops(batch, context) / self.best.matmul_rate
        return max(by_memory, by_arithmetic)

    def decode_share(self, batch: int) -> float:
        """The median share of the roofline, each step against the memory speed right after it."""
        return statistics.median(self.best.shares[batch])

    def prefill_share(self, length: int) -> float:
        """The share of the rate of matrix products."""
        rate = self.costs.prefill_flops([length]) / self.best.prefill_s[length]
        return rate / self.best.matmul_rate

    def _ceilings(self) -> None:
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        shapes = [
            (rows, *pair)
            for rows in self._sizes.gemm_rows
            for pair in ((hidden, hidden), (hidden, inner), (inner, hidden))
        ]
        rate = matmul_rate(shapes, torch.float32, CPU, repeats=3)
        self.best.read_bandwidth = max(self.best.read_bandwidth, self._reader.bandwidth(5))
        self.best.matmul_rate = max(self.best.matmul_rate, rate)

    def _decode(self, batch: int) -> None:
        run = self._engine.start(self._load.items(batch))
        shares = self.best.shares.setdefault(batch, [])
        while self._engine.engine.has_work:
            step = self._engine.step(run)
            if step.is_decode(batch) and len(run.steps) % _STEPS_PER_READ == 0:
                roof = self.roofline_s(batch, self._reader.bandwidth())
                shares.append(roof / step.seconds)
        steps = run.decode_steps(batch)
        seconds = median_seconds(steps)
        if batch in self.best.step_s and seconds >= self.best.step_s[batch]["step"]:
            return
        outputs = [step.output for step in steps]
        self.best.step_s[batch] = {
            "forward": statistics.median(output.forward_s for output in outputs),
            "sampling": statistics.median(output.sample_s for output in outputs),
            "step": seconds,
        }

    def _prefill(self, length: int) -> None:
        run = self._engine.run([Item(self._prompt(length), 1)])
        seconds = run.seconds
        self.best.prefill_s[length] = min(self.best.prefill_s.get(length, seconds), seconds)

    def _prefix(self) -> None:
        prefix = self._prompt(self._sizes.prefix)
        for name in ("first", "second"):
            run = self._engine.run([Item(prefix + self._prompt(self._sizes.suffix), 1)])
            seconds = run.seconds
            self.best.prefix_s[name] = min(self.best.prefix_s.get(name, seconds), seconds)

    def _streams(self, engine: LocalEngine, num_long: int) -> dict[str, float]:
        """Runs 8 streams beside long prompts, each sent after the first token of the previous."""
        load = uniform(self._sizes.prompt // 2, self._sizes.stream_answer, self._config.vocab_size)
        run = engine.start(load.items(8))
        streams = list(run.tokens)
        waits: list[float] = []
        while engine.engine.has_work:
            engine.step(run)
            if len(waits) < num_long and len(run.arrivals[streams[0]]) > 4:
                waits.append(self._wait_for_long(engine, run))
        found = gaps([run.arrivals[name] for name in streams])
        row = {f"p{percent}": percentile(found, percent) * 1000 for percent in (50, 99)}
        row["max"] = max(found) * 1000
        return row | ({"first_token": statistics.median(waits) * 1000} if waits else {})

    def _wait_for_long(self, engine: LocalEngine, run: Run) -> float:
        """Sends a long prompt; returns the seconds to its first token."""
        item = Item(self._prompt(self._sizes.long_prompt), 1)
        (name,) = engine.add(run, [item])
        sent = run.steps[-1].ended
        while not run.arrivals[name]:
            engine.step(run)
        return run.arrivals[name][0] - sent

    def _prompt(self, length: int) -> list[int]:
        self._salt += 1
        return prompt(length, self._salt, self._config.vocab_size)


def targets(bench: Bench) -> list[Target]:
    """The targets that this script measures."""
    best, largest, longest = bench.best, BATCHES[-1], max(bench.best.prefill_s)
    parts = best.step_s[largest]
    beside = (parts["step"] - parts["forward"]) / parts["step"]
    ratio = best.prefix_s["second"] / best.prefix_s["first"]
    return [
        Target("decode, 1 row, of the memory roofline", bench.decode_share(1), 0.85, percent=True),
        Target(
            f"prefill of {longest}, of the matmul rate",
            bench.prefill_share(longest),
            0.70,
            percent=True,
        ),
        Target(f"step beside its forward, {largest} rows", beside, 0.03, False, True),
        Target("first token after a known prefix, of the first", ratio, 0.05, False, True),
    ]


def report(bench: Bench, stalls: dict[str, dict[str, float]]) -> str:
    """All tables as text."""
    best, parts = bench.best, bench.best.step_s[BATCHES[-1]]
    rest = parts["step"] - parts["forward"] - parts["sampling"]
    first, second = (best.prefix_s[name] * 1000 for name in ("first", "second"))
    return "\n\n".join(
        [
            f"memory read {best.read_bandwidth / 1e9:.2f} GB/s, "
            f"matrix products {best.matmul_rate / 1e9:.0f} GFLOP/s",
            _decode_table(bench),
            _prefill_table(bench),
            f"a step of {BATCHES[-1]} rows: forward {parts['forward'] * 1000:.2f} ms, sampling "
            f"{parts['sampling'] * 1000:.2f} ms ({parts['sampling'] / parts['step']:.1%}), "
            f"everything else {rest * 1000:.2f} ms ({rest / parts['step']:.1%})",
            f"first token after a new prefix {first:.1f} ms, after a known one {second:.1f} ms",
            _stalls_table(stalls),
            targets_table(targets(bench)),
        ]
    )


def _decode_table(bench: Bench) -> str:
    rows = []
    for batch, parts in bench.best.step_s.items():
        seconds, roof = parts["step"], bench.roofline_s(batch, bench.best.read_bandwidth)
        rates = (f"{seconds * 1000:.2f}", f"{batch / seconds:.1f}", f"{batch / roof:.1f}")
        rows.append([str(batch), *rates, f"{bench.decode_share(batch):.1%}"])
    header = ["decode, rows", "ms/step", "tokens/s", "roof at best", "of the roof at the time"]
    return table(header, rows)


def _prefill_table(bench: Bench) -> str:
    rows = [
        [
            str(length),
            f"{seconds * 1000:.1f}",
            f"{length / seconds:.0f}",
            f"{bench.prefill_share(length):.1%}",
        ]
        for length, seconds in bench.best.prefill_s.items()
    ]
    return table(["prefill, tokens", "ms", "tokens/s", "of matmul rate"], rows)


def _stalls_table(stalls: dict[str, dict[str, float]]) -> str:
    keys = ("p50", "p99", "max", "first_token")
    rows = [
        [name, *(f"{row[key]:.1f}" if key in row else "-" for key in keys)]
        for name, row in stalls.items()
    ]
    header = ["ms between tokens of 8 streams", "p50", "p99", "max", "long prompt's first token"]
    return table(header, rows)


def engine(
    folder: Path, chunk_tokens: int, max_tokens: int, num_threads: int | None
) -> LocalEngine:
    """An engine that computes at most `chunk_tokens` of prompts in a step that also decodes."""
    config = EngineConfig(
        model_id=str(folder),
        socket_path=folder / "unused.sock",
        max_step_tokens=max_tokens,
        max_chunk_tokens=chunk_tokens,
        max_total_tokens=max_tokens,
        num_threads=num_threads,
    )
    return LocalEngine.build(config)


def options_from_command_line() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the best counts")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of prompts per step")
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    return parser.parse_args()


def as_json(bench: Bench) -> dict[str, Any]:
    """The figures for the last line."""
    return {
        "read_bytes_per_s": bench.best.read_bandwidth,
        "matmul_flop_per_s": bench.best.matmul_rate,
        "decode_share": {batch: bench.decode_share(batch) for batch in BATCHES},
        "prefill_s": bench.best.prefill_s,
        "decode_s": bench.best.step_s,
        "prefix_s": bench.best.prefix_s,
    }


def main() -> None:
    """Measures and prints."""
    arguments = options_from_command_line()
    model, sizes = llama_125m(), Sizes()
    if arguments.tiny:
        model, sizes = shrunk(model), TINY
    whole = 2 * max(sizes.long_prompt, sizes.prefix)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        limit = model.max_position_embeddings
        threads = 1 if arguments.tiny else None
        at_once = engine(Path(folder), whole, limit, threads)
        bench = Bench(model, at_once, engine(Path(folder), arguments.chunk, limit, threads), sizes)
        described = machine.describe()
        print(machine.line(described), flush=True)
        for _ in tqdm(range(arguments.repeat), desc="rounds", file=sys.stderr):
            bench.round()
        stalls = bench.stalls()
    print(f"\n{report(bench, stalls)}\n")
    result = {
        "machine": described,
        "attention": at_once.attention,
        **as_json(bench),
        "inter_token_ms": stalls,
        "chunk_tokens": arguments.chunk,
    }
    print(last_line(result, targets(bench)))


if __name__ == "__main__":
    main()
