"""How many sampled texts leave their path when the engine dies and a new one continues them.

Every stream is generated twice from the same seed: unbroken, and by engines that are thrown away
after random steps, each time with all its streams on the way. A new engine gets prompts and tokens
so far, as the service sends them after a crash, and computes their keys and values again, in chunks
and together with other streams. A stream leaves its path where a token differs; where none does,
log-probabilities may still differ in their last bits, which is counted as well.

    .venv/bin/python -m benchmarks.resumption

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine
from benchmarks.random_model import prompt
from benchmarks.report import table
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams, Token

DEMO_MODEL = Path(__file__).parent.parent / "models" / "demo"
# The last is torch's arithmetic, as where there is no C compiler: its rounding depends on a step.
ARMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "float32, 3 draft tokens": {"speculate": 3},
    "float32, without our kernels": {"enable_native_kernels": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The streams of an arm.

    Attributes:
        model: a directory.
        streams: how many.
        tokens: of each stream.
        concurrency: streams at a time.
        steps: between two kills, on average.
    """

    model: str
    streams: int
    tokens: int
    concurrency: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the streams of an arm.

    Attributes:
        name: of the arm.
        streams: how many.
        kills: engines thrown away.
        resumptions: streams continued by a new engine, once for each time.
        recomputed_tokens: generated tokens whose keys and values were computed again.
        left: streams with another token than the unbroken one.
        left_at: the first such token of each, counted from 0.
        rounded: streams with the same tokens, of which some log-probability differs.
    """

    name: str
    streams: int
    kills: int
    resumptions: int
    recomputed_tokens: int
    left: int
    left_at: list[int]
    rounded: int


class Streams:
    """Generates streams with one engine after the other.

    Args:
        load: what to generate.
        settings: of the engines; those of `EngineConfig`.
    """

    def __init__(self, load: Load, settings: dict[str, Any]) -> None:
        self._load = load
        self._settings = settings
        self.kills = self.resumptions = self.recomputed_tokens = 0

    def generate(
        self, requests: list[Request], rng: random.Random | None
    ) -> dict[str, list[Token]]:
        """The tokens of each request; engines die at random if there is a generator."""
        tokens: dict[str, list[Token]] = {request.request_id: [] for request in requests}
        waiting, running = list(reversed(requests)), dict[str, Request]()
        while waiting or running:
            engine = self._engine()
            self._resume(engine, running, tokens)
            for _ in self._lifetime(rng):
                while waiting and len(running) < self._load.concurrency:
                    request = waiting.pop()
                    running[request.request_id] = request
                    _add(engine, request)
                _step(engine, running, tokens)
                if not (waiting or running):
                    return tokens
            self.kills += 1
        return tokens

    def _engine(self) -> Engine:
        config = EngineConfig(
            model_id=self._load.model,
            socket_path=Path("unused.sock"),
            device="cpu",
            max_batch_total_tokens=2048 * self._load.concurrency,
            **self._settings,
        )
        return build_engine(config)[0]

    def _resume(
        self, engine: Engine, running: dict[str, Request], tokens: dict[str, list[Token]]
    ) -> None:
        for name, request in running.items():
            ids = tuple(token.token_id for token in tokens[name])
            self.resumptions += 1
            self.recomputed_tokens += len(ids)
            _add(engine, replace(request, resumed_token_ids=ids))

    def _lifetime(self, rng: random.Random | None) -> Iterator[int]:
        """As many numbers as steps that an engine lives."""
        steps = 2**62 if rng is None else 1 + int(rng.expovariate(1 / self._load.steps))
        return iter(range(steps))


def _add(engine: Engine, request: Request) -> None:
    refused = engine.add(request)
    if refused is not None:
        raise RuntimeError(refused.error)


def _step(engine: Engine, running: dict[str, Request], tokens: dict[str, list[Token]]) -> None:
    """Computes a step; removes streams that have ended from those that run."""
    for output in engine.step().outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
        if output.token is not None:
            tokens[output.request_id].append(output.token)
        if output.is_last:
            del running[output.request_id]


def requests(load: Load, vocab_size: int) -> list[Request]:
    """Sampled streams with prompts of 4 to 300 random tokens; each has a seed of its own."""
    rng = random.Random(0)
    return [
        Request(
            request_id=f"{number}",
            prompt_token_ids=tuple(prompt(rng.randint(4, 300), number, vocab_size)),
            max_new_tokens=load.tokens,
            sampling=SamplingParams(do_sample=True, seed=rng.getrandbits(64)),
        )
        for number in range(load.streams)
    ]


def measure(name: str, load: Load, settings: dict[str, Any], vocab_size: int) -> Outcome:
    """Generates the streams unbroken and, in another order, with kills; compares them."""
    todo = requests(load, vocab_size)
    unbroken = Streams(load, settings).generate(todo, None)
    streams = Streams(load, settings)
    broken = streams.generate(random.Random(1).sample(todo, len(todo)), random.Random(2))
    left_at, rounded = [], 0
    for stream, expected in unbroken.items():
        pairs = list(zip(expected, broken[stream], strict=True))
        wrong = [at for at, (a, b) in enumerate(pairs) if a.token_id != b.token_id]
        left_at += wrong[:1]
        rounded += not wrong and expected != broken[stream]
    return Outcome(
        name=name,
        streams=len(todo),
        kills=streams.kills,
        resumptions=streams.resumptions,
        recomputed_tokens=streams.recomputed_tokens,
        left=len(left_at),
        left_at=left_at,
        rounded=rounded,
    )


def vocabulary(model: str) -> int:
    """The number of a model's tokens."""
    return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])


def row(outcome: Outcome) -> list[str]:
    """A line of the table."""
    counts = (outcome.streams, outcome.kills, outcome.resumptions, outcome.recomputed_tokens)
    rate = f"{outcome.left} ({outcome.left / outcome.streams:.2%})"
    return [outcome.name, *map(str, counts), rate, str(outcome.rounded)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a directory with a checkpoint")
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="between kills, on average")
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    options = parser.parse_args()
    load = Load(
        model=options.model,
        streams=4 if options.tiny else options.streams,
        tokens=12 if options.tiny else options.tokens,
        concurrency=2 if options.tiny else options.concurrency,
        steps=6 if options.tiny else options.steps,
    )
    described = machine.describe()
    outcomes = [
        measure(name, load, settings, vocabulary(load.model))
        for name, settings in tqdm(ARMS.items(), desc="arms", file=sys.stderr)
    ]
    print(machine.line(described))
    header = ["", "streams", "kills", "resumed", "tokens again", "left their path", "other bits"]
    print(table(header, [row(outcome) for outcome in outcomes]))
    found = [asdict(outcome) for outcome in outcomes]
    print(json.dumps({"machine": described, "load": asdict(load), "outcomes": found}))


if __name__ == "__main__":
    main()
