"""What prompt lookup gains on text that repeats itself and on text that does not.

One run with a random 124 M Llama in float32 and the same requests with `--speculate` off and on.
Greedy generation with random weights runs into loops: that is the repetitive text. Sampling from
them at temperature 1 is text in which every draft token is wrong. Both arms must generate the same
tokens, or the script fails. Arms take turns; the best round counts.

    .venv/bin/python -m benchmarks.speculation

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.random_model import VOCAB_SIZE, llama_125m, prompt, save, shrunk
from benchmarks.report import table
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams

CONCURRENCY = (1, 8)  # streams
NEW_TOKENS = 128
REPETITIVE, RANDOM = "repetitive", "random"


def requests(
    kind: str,
    count: int,
    round_number: int,
    vocab_size: int = VOCAB_SIZE,
    new_tokens: int = NEW_TOKENS,
) -> list[Request]:
    """The requests of one measurement; prompts of different rounds share no prefix."""
    sampling = SamplingParams(do_sample=kind == RANDOM, seed=7)
    made = []
    for number in range(count):
        salt = 1000 * round_number + 100 * (kind == RANDOM) + number
        period, times = (32, 4) if kind == REPETITIVE else (128, 1)
        ids = prompt(period, salt, vocab_size) * times
        request = Request(
            request_id=f"{kind}-{salt}",
            prompt_token_ids=tuple(ids),
            max_new_tokens=new_tokens,
            sampling=sampling,
        )
        made.append(request)
    return made


def run(engine: Engine, todo: list[Request]) -> tuple[dict[str, list[int]], float, int]:
    """Runs requests; returns the tokens of each, tokens per second of decoding, and steps."""
    tokens: dict[str, list[int]] = {}
    for request in todo:
        assert engine.add(request) is None
    steps = 0
    started = time.perf_counter()
    while engine.has_work:
        for output in engine.step().outputs:
            if output.token is not None:
                tokens.setdefault(output.request_id, []).append(output.token.token_id)
        if len(tokens) < len(todo):
            started = time.perf_counter()  # prefill does not count
        steps += 1
    num_decoded = sum(request.max_new_tokens - 1 for request in todo)
    return tokens, num_decoded / (time.perf_counter() - started), steps


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of text at a number of streams; figures by the number of draft tokens."""

    text: str
    streams: int
    tokens_per_s: dict[int, float]  # of the best round
    steps: dict[int, int]  # of the last round


def measure(engines: dict[int, Engine], rounds: int, vocab_size: int, new_tokens: int) -> list[Row]:
    """One row per kind of text and number of streams."""
    rows: list[Row] = []
    for kind in (REPETITIVE, RANDOM):
        for count in CONCURRENCY:
            best = dict.fromkeys(engines, 0.0)
            steps = dict.fromkeys(engines, 0)
            for round_number in tqdm(range(rounds), desc=f"{kind} {count}", leave=False):
                todo = requests(kind, count, round_number, vocab_size, new_tokens)
                seen = []
                turns = [*engines.items()]  # who goes first changes from round to round
                for size, engine in turns if round_number % 2 else turns[::-1]:
                    tokens, rate, steps[size] = run(engine, todo)
                    best[size] = max(best[size], rate)
                    seen.append(tokens)
                assert all(tokens == seen[0] for tokens in seen), "speculation changed a token"
            rows.append(Row(kind, count, best, steps))
    return rows


def build_engines(folder: Path, speculate: int) -> dict[int, Engine]:
    """Engines without and with speculation, by the number of draft tokens."""
    engines = {}
    for size in (0, speculate):
        config = EngineConfig(
            model_id=str(folder),
            socket_path=folder / "unused.sock",
            speculate=size,
            enable_prefix_caching=False,
        )
        engines[size], _ = build_engine(config)
    return engines


def report(rows: list[Row]) -> None:
    """Prints a table, and the JSON line."""
    cells = []
    for row in rows:
        off, on = row.tokens_per_s.values()
        steps = " / ".join(map(str, row.steps.values()))
        figures = (f"{off:.1f}", f"{on:.1f}", f"{on / off:.2f}", steps)
        cells.append([row.text, str(row.streams), *figures])
    print(table(["text", "streams", "off", "on", "ratio", "steps"], cells))
    print(json.dumps([asdict(row) for row in rows]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--speculate", type=int, default=6, help="draft tokens per sequence and step, at most"
    )
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    options = parser.parse_args()
    model = shrunk(llama_125m()) if options.tiny else llama_125m()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        engines = build_engines(Path(folder), options.speculate)
        new_tokens = 16 if options.tiny else NEW_TOKENS
        report(measure(engines, options.rounds, model.vocab_size, new_tokens))


if __name__ == "__main__":
    main()
