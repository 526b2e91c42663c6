"""The engine and the server on the CPU against peers, on one model with one load.

All have the same random 124 M Llama in float32, the same number of threads and the same lengths of
prompts and answers, which differ within a batch. They take turns, and the best round counts:

* the engine alone, in this process, also on its own 8 bits;
* the whole server, over gRPC and over REST;
* `transformers.generate`, static batches, padded;
* continuous batching of transformers (slow: only in the first rounds);
* OpenVINO GenAI's continuous batching (it reads no float32 GGUF: float16, computed in float32);
* vLLM's CPU build, eager;
* CTranslate2, batches that start together, in float32 and in int8;
* the server of llama.cpp with one slot per stream.

The last four are installed into environments of their own, or built from source (ten minutes), when
this first runs. Figures are generated tokens per second of wall clock, prefill included, counting
only the tokens that were requested; for a single stream also the rate of decoding alone, and for
all the time between two tokens of a stream. A peer that is not available is listed as absent, with
the reason. Run it on a quiet machine; it takes about half an hour:

    .venv/bin/python -m benchmarks.peers

With `--gguf FILE` all run that file instead, as real models come, and with `--smollm2` that of a
package: llama.cpp and OpenVINO on its quantised weights, transformers on what it dequantises of
them, and the engine both on those and on its own 8 bits. The whole server is left out then, whose
prompts are words of the random model.

The last line is one JSON document; `peer_plots` draws those of several runs.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import contenders, machine, smollm2, transformers_peers
from benchmarks.contenders import (
    ALONE,
    ALONE_INT8,
    CHECKED,
    CONTINUOUS,
    GENERATE,
    LLAMA,
    OPENVINO,
    OPTIONAL,
    OURS,
    OVER_GRPC,
    Arm,
    Contenders,
    Outcome,
    Start,
)
from benchmarks.load import Item, Load, generated, uniform
from benchmarks.local_engine import gaps
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.report import Target, last_line, percentile, table, targets_table


@dataclass(slots=True)
class Results:
    """The best of all rounds, by the name of the arm.

    Attributes:
        rates: tokens per second by number of streams.
        gaps_ms: p50 and p99 of the time between tokens, of the best round.
    """

    rates: dict[str, dict[int, float]] = field(default_factory=dict)
    gaps_ms: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, int] = field(default_factory=dict)

    def note(self, arm: str, items: list[Item], outcome: Outcome) -> None:
        """Records an outcome."""
        rates, count = self.rates.setdefault(arm, {}), len(items)
        rate = generated(items) / outcome.seconds
        if rate > rates.get(count, 0.0):
            rates[count] = rate
            between = [1000 * gap for gap in gaps(map(list, outcome.streams))]
            if between:
                both = (percentile(between, 50), percentile(between, 99))
                self.gaps_ms.setdefault(arm, {})[count] = both
        if count == 1 and outcome.decode_rate is not None:
            self.decode[arm] = max(self.decode.get(arm, 0.0), outcome.decode_rate)

    def note_first(self, arm: str, seconds: float) -> None:
        """Records a time to the first token."""
        self.first_token_s[arm] = min(self.first_token_s.get(arm, seconds), seconds)

    def ratio(self, arm: str, peer: str, count: int) -> float | None:
        """How many times as fast as a peer an arm is."""
        ours, theirs = (self.rates.get(name, {}).get(count) for name in (arm, peer))
        return None if ours is None or theirs is None else ours / theirs


class Peers:
    """All contenders, in turns.

    Args:
        found: those that are available.
        model: the model of transformers.
        load: makes the requests.
        counts: numbers of streams.
        seconds: after which no run begins any more.
    """

    def __init__(
        self, found: Contenders, model: Any, load: Load, counts: Sequence[int], seconds: float
    ) -> None:
        self.results = Results(absent=found.absent)
        self._deadline = time.monotonic() + seconds
        self._arms, self._model, self._load, self._counts = found.arms, model, load, counts

    def check(self, expected: list[int], found: dict[str, list[int]]) -> None:
        """Records how many greedy tokens of each arm agree with `generate` of transformers."""
        for arm, tokens in found.items():
            pairs = zip(expected, tokens, strict=False)
            differing = [at for at, (left, right) in enumerate(pairs) if left != right]
            self.results.agreement[arm] = min([*differing, len(tokens)])

    async def warm_up(self) -> None:
        """Lets every arm compute once, since the first time takes longer."""
        for name, by_count in self._arms.items():
            for count, arm in by_count.items():
                if count == self._counts[0] or arm is not by_count[self._counts[0]]:
                    items = uniform(16, 4, self._model.config.vocab_size).items(count)
                    await self._outcome(name, arm, items)

    async def round(self, with_continuous: bool, bar: tqdm[Any]) -> None:
        """Runs every arm once at every number of streams."""
        for count in self._counts:
            arms = {name: by_count[count] for name, by_count in self._arms.items()}
            for name, arm in (arms | (self._continuous if with_continuous else {})).items():
                if time.monotonic() > self._deadline:
                    return
                bar.set_description(f"{name}, {count}")
                items = self._load.items(count)
                outcome = await self._outcome(name, arm, items)
                if outcome is not None:
                    self.results.note(name, items, outcome)
                bar.update()
        await self._first_tokens()

    def num_runs(self, rounds: int, with_continuous: int) -> int:
        """The number of runs in `rounds`, of which some have continuous batching."""
        return len(self._counts) * (rounds * len(self._arms) + with_continuous)

    @property
    def _continuous(self) -> dict[str, Arm]:
        async def arm(items: list[Item]) -> Outcome:
            return await contenders.continuous(self._model, self._load, items)

        return {CONTINUOUS: arm}

    async def _outcome(self, name: str, arm: Arm, items: list[Item]) -> Outcome | None:
        """The outcome of an arm; None if a peer failed, which is then listed as absent."""
        try:
            return await arm(items)
        except Exception as error:
            if name in OURS:
                raise
            self.results.absent[f"{name}, {len(items)}"] = repr(error)[:300]
            return None

    async def _first_tokens(self) -> None:
        """First tokens of a single prompt on idle peers."""
        load = uniform(self._load.prompt_tokens[1], 2, self._model.config.vocab_size)
        for name, by_count in self._arms.items():
            outcome = await self._outcome(name, by_count[self._counts[0]], load.items(1))
            if outcome is not None and outcome.streams:
                self.results.note_first(name, outcome.streams[0][0])


def targets(results: Results, counts: Sequence[int]) -> list[Target]:
    """The targets that this script measures, of the peers that took part."""
    ours = OVER_GRPC if OVER_GRPC in results.rates else ALONE
    theirs, decode = results.decode.get(LLAMA), results.decode
    found = [
        Target(f"{arm} / {LLAMA}, 1 stream, decoding", rate / theirs, 1.0)
        for arm, rate in decode.items()
        if arm in OURS and theirs is not None
    ]
    for count in counts:
        goals = {OPENVINO: 1.2 if count == 1 else 1.5}
        if count > 1:
            goals |= {GENERATE: 1.5, CONTINUOUS: 4.0, LLAMA: 1.0}
        found += [
            Target(f"{arm} / {peer}, {count} streams", results.ratio(arm, peer, count), goal)
            for peer, goal in goals.items()
            for arm in dict.fromkeys((ALONE, ours))
            if peer in results.rates
        ]
    return found


def report(results: Results, counts: Sequence[int]) -> str:
    """All tables as text."""
    rows, waits = [], []
    for arm, rates in results.rates.items():
        ours = ALONE_INT8 if arm.endswith("int8") else ALONE
        cells = [
            f"{rates[n]:.1f} ({results.ratio(ours, arm, n) or 0:.2f} x)" if n in rates else "-"
            for n in counts
        ]
        decode = f"{results.decode[arm]:.1f}" if arm in results.decode else "-"
        first = results.first_token_s.get(arm)
        rows.append([arm, *cells, decode, "-" if first is None else f"{first * 1000:.0f}"])
        between = results.gaps_ms.get(arm, {})
        pairs = [between.get(n) for n in counts]
        waits.append([arm, *(f"{one[0]:.0f}, {one[1]:.0f}" if one else "-" for one in pairs)])
    streams = list(map(str, counts))
    lines = [
        table(["tokens/s (ours by it)", *streams, "1, decoding", "first token, ms"], rows),
        "",
        table(["ms between tokens, p50 and p99", *streams], waits),
        *(f"absent: {arm}: {reason}" for arm, reason in results.absent.items()),
        *(
            f"{arm}: {count} of {CHECKED} greedy tokens are those of transformers"
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
        start = Start(stack, model, path, load, arguments.counts, arguments.without)
        found = await start.all()
        peers = Peers(found, model, load, arguments.counts, arguments.seconds)
        peers.check(start.expected(), found.tokens)
        await peers.warm_up()
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
    counts = [1, 2, 4, 8, 16, 32]
    add("--counts", type=int, nargs="+", default=counts, help="numbers of streams")
    add("--seconds", type=float, default=math.inf, help="begin no run after that")
    add("--prompts", type=int, nargs=2, default=(32, 224), help="shortest and longest, tokens")
    add("--answers", type=int, nargs=2, default=(16, 112), help="shortest and longest, tokens")
    add("--without", nargs="*", default=[], choices=OPTIONAL, help="leave out")
    add("--gguf", type=Path, help="run this file instead of a random model")
    add("--smollm2", action="store_true", help="run a package's file of SmolLM2")
    add("--tiny", action="store_true", help="only to see that everything runs")
    arguments = parser.parse_args()
    if arguments.smollm2:
        arguments.gguf = smollm2.gguf()
    if "transformers" in arguments.without:
        arguments.slow_repeat = 0
    return arguments


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
        "ms_between_tokens": results.gaps_ms,
        "decode_tokens_per_second": results.decode,
        "first_token_s": results.first_token_s,
        "absent": results.absent,
        "agreement": results.agreement,
    }
    print(last_line(result, targets(results, arguments.counts)))


if __name__ == "__main__":
    main()
