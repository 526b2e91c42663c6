"""How much faster weights of 8 and 4 bits decode on the CPU of this machine.

All formats have the same random 124 M Llama and the same requests in one run. Engines take turns;
the median step of the best round counts. Random weights say nothing about the quality of answers.
`--mixture` has a mixture of 32 experts in place of the Llama, and a fourth contender: int8 whose
experts stay in float32, as they were before they could be quantised.

    .venv/bin/python -m benchmarks.quantized [--mixture]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from torch import nn
from tqdm import tqdm

from benchmarks import machine
from benchmarks.load import uniform
from benchmarks.local_engine import LocalEngine, median_seconds
from benchmarks.random_model import llama_125m, qwen3_moe_192m, save, shrunk
from benchmarks.report import table
from engine.model.quantization import Scheme
from engine.protocol.config import EngineConfig

FORMATS = ("float32", "int8", "int4")
LEFT = "int8, experts left"
BATCHES = (1, 8, 32)


def engine(folder: Path, name: str) -> LocalEngine:
    """An engine with weights of this format."""
    quantize = None if name == "float32" else name.partition(",")[0]
    config = EngineConfig(
        model_id=str(folder), socket_path=folder / "unused.sock", device="cpu", quantize=quantize
    )
    with patch.object(Scheme, "takes_experts", _no_experts) if name == LEFT else nullcontext():
        return LocalEngine.build(config)


def _no_experts(_scheme: Scheme, _layer: nn.Module) -> bool:
    return False


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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixture", action="store_true", help="of experts, not the Llama")
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    options = parser.parse_args()
    config = qwen3_moe_192m() if options.mixture else llama_125m()
    config = shrunk(config) if options.tiny else config
    names = (*FORMATS, LEFT) if options.mixture else FORMATS
    with tempfile.TemporaryDirectory() as folder:
        save(config, Path(folder))
        engines = {name: engine(Path(folder), name) for name in names}
    described = machine.describe()
    rates = measure(engines, options.rounds, 8 if options.tiny else 48, config.vocab_size)
    print(machine.line(described))
    rows = [
        [name, *(f"{rate:.0f} ({rate / rates['float32'][n]:.2f})" for n, rate in found.items())]
        for name, found in rates.items()
    ]
    print(table(["tokens/s (times float32)", *map(str, BATCHES)], rows))
    print(json.dumps({"machine": described, "tokens_per_second": rates}))


if __name__ == "__main__":
    main()
