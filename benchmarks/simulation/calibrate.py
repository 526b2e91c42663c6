r"""Measures what steps take on this machine, and writes `costs.json` for the simulation.

A random Llama with 124 M parameters computes batches of several sizes, with prompts of several
lengths in chunks beside decoding rows. What a step takes is fitted to rows, tokens of prompts and
tokens that decoding rows attend to. What Envoy and services take comes from runs of
`benchmarks.scale`, of which at least two differ in the tokens of an answer, and two in their rate:

    .venv/bin/python -m benchmarks.scale --workers 1 --echo 0.02 --rates 50 100 --requests 500 \
        --output-tokens 4 > short.txt     # and 64 > long.txt
    .venv/bin/python -m benchmarks.simulation.calibrate --scale short.txt long.txt --write
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.load import Item, uniform
from benchmarks.local_engine import LocalEngine, Run
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.simulation.costs import MEASURED
from benchmarks.simulation.fit import Fit, fit
from engine.protocol.config import EngineConfig

STEP = ("base_s", "per_row_s", "per_prompt_token_s", "per_context_token_s")
HANDLING = ("idle_share", "per_call_s", "per_token_s")  # the first of each second
_STEP_TOKENS = 256  # so that most prompts are computed beside decoding rows
_LOADS = ((1, 128), (1, 1024), (4, 128), (8, 512), (16, 64), (32, 64), (32, 128))  # rows, prompt
_TINY_LOADS = ((1, 16), (2, 40), (4, 8), (4, 300))


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What was in a step, and how long it took."""

    rows: int
    prompt_tokens: int
    context_tokens: int
    seconds: float

    @property
    def counts(self) -> tuple[int, ...]:
        """In the order of `STEP`."""
        return (1, self.rows, self.prompt_tokens, self.context_tokens)


def steps_of(engine: LocalEngine, items: list[Item]) -> list[MeasuredStep]:
    """Runs some items and measures each step."""
    run = engine.start(items)
    by_id = dict(zip(run.tokens, items, strict=True))
    found = []
    while engine.engine.has_work:
        decoding = _decoding(run, by_id)
        before = run.num_tokens
        step = engine.step(run)
        if step.output.num_scheduled_tokens:  # not one that only reads the last one's tokens
            prompt_tokens = step.output.num_scheduled_tokens - len(decoding)
            rows = run.num_tokens - before
            found.append(MeasuredStep(rows, prompt_tokens, sum(decoding), step.seconds))
    return found


def _decoding(run: Run, by_id: dict[str, Item]) -> list[int]:
    """Tokens in the cache of each sequence that will decode in the next step."""
    return [
        len(by_id[name].prompt) + len(tokens)
        for name, tokens in run.tokens.items()
        if 0 < len(tokens) < by_id[name].new_tokens
    ]


def measure_steps(is_tiny: bool) -> list[MeasuredStep]:
    """Steps of all loads, each after one that only warms up."""
    config = shrunk(llama_125m()) if is_tiny else llama_125m()
    with tempfile.TemporaryDirectory() as folder:
        save(config, Path(folder))
        engine = LocalEngine.build(
            EngineConfig(
                model_id=folder,
                socket_path=Path(folder) / "unused.sock",
                device="cpu",
                run_ahead=False,
                max_step_tokens=_STEP_TOKENS,
                max_batch_total_tokens=16_384,
                enable_prefix_caching=False,
            )
        )
        steps_of(engine, uniform(16, 4, config.vocab_size).items(2))
        return [
            step
            for rows, prompt_tokens in (_TINY_LOADS if is_tiny else _LOADS)
            for step in steps_of(engine, uniform(prompt_tokens, 24, config.vocab_size).items(rows))
        ]


def handling(files: list[Path], role: str) -> Fit:
    """Of a kind of process, by its processor time in runs of `benchmarks.scale`.

    Runs in which calls failed are left out: these took something, too.
    """
    points = [point for file in files for point in _last_line(file)["points"]]
    points = [point for point in points if not point["summary"]["failures"]]
    counts = [(point["seconds"], point["calls"], point["tokens"]) for point in points]
    return fit(HANDLING, counts, [point["cpu_s"][role] for point in points])


def _last_line(file: Path) -> Any:
    return json.loads(file.read_text().splitlines()[-1])


def _report(name: str, found: Fit) -> str:
    costs = ", ".join(f"{key} {value:.3g}" for key, value in found.seconds.items())
    return f"{name}: {costs}; off by {found.median_error:.0%} (median), {found.p90_error:.0%} (p90)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=Path, nargs="+", default=[], help="outputs of the other")
    parser.add_argument("--write", action="store_true", help=f"to {MEASURED.name}")
    parser.add_argument("--tiny", action="store_true", help="a try-out that takes seconds")
    given = parser.parse_args()
    if given.write and not given.scale:
        parser.error("--write needs --scale: the file has all costs, of one machine")
    steps = measure_steps(given.tiny)
    fits = {"step": fit(STEP, [step.counts for step in steps], [step.seconds for step in steps])}
    if given.scale:
        fits |= {role: handling(given.scale, role) for role in ("service", "envoy")}
    for name, item in fits.items():
        print(_report(name, item))
    found = {"machine": machine.describe(), "model": "random Llama, 124 M, float32"}
    found |= {name: asdict(item) for name, item in fits.items()}
    if given.write:
        MEASURED.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
