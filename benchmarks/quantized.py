"""How much faster weights of 16, 8 and 4 bits are on the CPU of this machine.

All formats have the same random 124 M Llama and the same requests in one run. Engines take turns;
the median step of the best round counts, and the best first token of a long prompt. Random weights
say nothing about the quality of answers. `--mixture` has a mixture of 32 experts in place of the
Llama, and one more contender: float32 whose experts are torch's grouped product.

    .venv/bin/python -m benchmarks.quantized [--mixture]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tqdm import tqdm

from benchmarks import machine
from benchmarks.load import uniform
from benchmarks.local_engine import LocalEngine, median_seconds
from benchmarks.random_model import llama_125m, qwen3_moe_192m, save, shrunk
from benchmarks.report import table
from engine.model import passes
from engine.protocol.config import EngineConfig

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
LEFT = "float32, experts by torch"
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 2000


def engine(folder: Path, name: str) -> LocalEngine:
    """An engine with weights of this format."""
    config = EngineConfig(
        model_id=str(folder),
        socket_path=folder / "unused.sock",
        device="cpu",
        enable_prefix_caching=False,
        **FORMATS.get(name, {}),
    )
    left = patch.object(passes, "pack_mixtures", lambda *_: 0) if name == LEFT else nullcontext()
    with left:
        return LocalEngine.build(config)


def measure(
    engines: dict[str, LocalEngine], rounds: int, answer: int, vocab_size: int
) -> dict[str, dict[int, float]]:
    """Tokens per second by format and batch size."""
    rates: dict[str, dict[int, float]] = {name: {} for name in engines}
    load = uniform(answer, answer, vocab_size)
    for _ in tqdm(range(rounds), desc="rounds", file=sys.stderr):
        for batch in BATCHES:
            for name, engine in engines.items():
                steps = engine.run(load.items(batch)).decode_steps(batch)
                rate = batch / median_seconds(steps)
                rates[name][batch] = max(rates[name].get(batch, 0.0), rate)
    return rates


def measure_first(
    engines: dict[str, LocalEngine], rounds: int, prompt: int, vocab_size: int
) -> dict[str, float]:
    """Seconds to the first token of a lone prompt, by format."""
    seconds = dict.fromkeys(engines, math.inf)
    load = uniform(prompt, 1, vocab_size)
    for _ in range(rounds):
        for name, engine in engines.items():
            seconds[name] = min(seconds[name], engine.run(load.items(1)).seconds)
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixture", action="store_true", help="of experts, not the Llama")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, LEFT], help="these alone")
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    options = parser.parse_args()
    config = qwen3_moe_192m() if options.mixture else llama_125m()
    config = shrunk(config) if options.tiny else config
    names = options.formats or ([*FORMATS, LEFT] if options.mixture else [*FORMATS])
    with tempfile.TemporaryDirectory() as folder:
        save(config, Path(folder))
        engines = {name: engine(Path(folder), name) for name in names}
    described = machine.describe()
    rates = measure(engines, options.rounds, 8 if options.tiny else 48, config.vocab_size)
    prompt = 100 if options.tiny else PROMPT_TOKENS
    first = measure_first(engines, options.rounds, prompt, config.vocab_size)
    print(machine.line(described))
    base = rates[names[0]]
    rows = [
        [
            name,
            *(f"{rate:.0f} ({rate / base[n]:.2f})" for n, rate in found.items()),
            f"{1000 * first[name]:.0f} ms ({first[names[0]] / first[name]:.2f})",
        ]
        for name, found in rates.items()
    ]
    columns = [f"tokens/s (times {names[0]})", *map(str, BATCHES), f"first token of {prompt}"]
    print(table(columns, rows))
    print(json.dumps({"machine": described, "tokens_per_second": rates, "first_s": first}))


if __name__ == "__main__":
    main()
