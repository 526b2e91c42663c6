"""What LoRA adapters cost: decoding at 32 rows, of the base model, with eight, and mixed.

An engine has eight adapters of rank 16 that change every linear layer. Four loads take turns on it,
in short rounds, so that a disturbance affects all: 32 rows of the base model, 32 rows with eight
adapters, and 16 rows of the base model beside 16 with eight adapters or with one. A fifth runs on
an engine without adapters, to see that having some costs those nothing who use none. The models are
the bundled one and a random Llama of 124 M parameters.

A round's ratio compares the median durations of steps in which all 32 rows decode; the median of
all rounds counts. In a mixed batch the rows of the base model get a token in every step, like all
others, so that their share of the speed is the step's.

    .venv/bin/python -m benchmarks.adapters

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks import machine
from benchmarks.load import uniform
from benchmarks.local_engine import LocalEngine, median_seconds
from benchmarks.random_model import llama_125m, save, shrunk
from benchmarks.report import Target, last_line, table, targets_table
from engine.adapters.peft_directory import CONFIG_NAME, WEIGHTS_NAME
from engine.protocol.config import EngineConfig
from service.bundled import demo_model

ROWS = 32
NUM_ADAPTERS = 8
RANK = 16
BASE = "base"
LOADS = (BASE, "base, none loaded", "all rows, 8", "half of the rows, 8", "half of the rows, 1")
_DTYPES = ("float32", "bfloat16", "float16")
# Of the base model's speed, by load and number of adapters.
_GOALS = {"all rows, 8": 0.70, "half of the rows, 8": 0.95, "half of the rows, 1": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens of prompts and answers, and the format of the adapters' files."""

    prompt: int = 16
    answer: int = 24
    dtype: torch.dtype = torch.float32


@dataclass(slots=True)
class Measured:
    """The median seconds of steps in which all rows decode, of each round, by load."""

    steps: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LOADS})

    def step_s(self, load: str) -> float:
        """The median over rounds."""
        return statistics.median(self.steps[load])

    def ratio(self, load: str) -> float:
        """The speed as a part of the base model's."""
        pairs = zip(self.steps[BASE], self.steps[load], strict=True)
        return statistics.median(base / step for base, step in pairs)


def make_adapter(model_path: Path, path: Path, seed: int, dtype: torch.dtype) -> Path:
    """Writes an adapter with small random updates of all linear layers but the output layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            for part, shape in [
                ("A", (RANK, module.in_features)),
                ("B", (module.out_features, RANK)),
            ]:
                values = torch.randn(*shape, generator=generator) * 0.01
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values.to(dtype)
    path.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (path / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS_NAME)
    return path


class Bench:
    """All loads on one model."""

    def __init__(self, model_path: Path, directory: Path, sizes: Sizes) -> None:
        paths = [
            make_adapter(model_path, directory / f"{index}", index, sizes.dtype)
            for index in range(NUM_ADAPTERS)
        ]
        config = EngineConfig(
            model_id=str(model_path),
            socket_path=directory / "socket",
            device="cpu",
            max_batch_total_tokens=8192,
            enable_prefix_caching=False,
        )
        adapters = tuple((path.name, str(path)) for path in paths)
        self._plain = LocalEngine.build(config)
        self._adapted = LocalEngine.build(replace(config, adapters=adapters))
        self._load = uniform(sizes.prompt, sizes.answer, vocab_size=_vocab_size(model_path))
        self.measured = Measured()

    def round(self) -> None:
        """Runs every load once."""
        owners = [*self._adapted.adapters] * (ROWS // NUM_ADAPTERS)
        halves = [
            [owners[row // 2 % count] if row % 2 else "" for row in range(ROWS)]
            for count in (NUM_ADAPTERS, 1)
        ]
        self._run(BASE, self._adapted, [""] * ROWS)
        self._run("base, none loaded", self._plain, [""] * ROWS)
        self._run("all rows, 8", self._adapted, owners)
        for name, half in zip(LOADS[-2:], halves, strict=True):
            self._run(name, self._adapted, half)

    def _run(self, name: str, engine: LocalEngine, owners: list[str]) -> None:
        items = self._load.items(ROWS)
        run = engine.run(
            replace(item, adapter=owner) for item, owner in zip(items, owners, strict=True)
        )
        self.measured.steps[name].append(median_seconds(run.decode_steps(ROWS)))


def _vocab_size(model_path: Path) -> int:
    return int(json.loads((model_path / "config.json").read_text())["vocab_size"])


def _row(name: str, measured: Measured) -> list[str]:
    step_s = measured.step_s(name)
    base_rows = {"all": 0, "half": ROWS // 2}.get(name.partition(" ")[0], ROWS)
    return [
        name,
        f"{step_s * 1000:.2f}",
        f"{ROWS / step_s:,.0f}",
        f"{base_rows / step_s:,.0f}" if base_rows else "-",
        f"{measured.ratio(name):.1%}",
    ]


def _measure(name: str, path: Path, directory: Path, sizes: Sizes, repeat: int) -> Measured:
    """Rounds of all loads, after one that is not counted: steps are recorded in it."""
    directory.mkdir()
    bench = Bench(path, directory, sizes)
    bench.round()
    bench.measured = Measured()
    for _ in tqdm(range(repeat), desc=name, file=sys.stderr):
        bench.round()
    return bench.measured


def _report(name: str, measured: Measured) -> list[Target]:
    """Prints a table; returns the targets."""
    header = [f"{name}, {ROWS} rows", "ms/step", "tokens/s", "of base rows", "of the base"]
    print(table(header, [_row(load, measured) for load in LOADS]))
    return [
        Target(f"{name}, {load}", measured.ratio(load), goal, percent=True)
        for load, goal in _GOALS.items()
    ]


def main() -> None:
    """Measures, and prints tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=10, help="rounds that are counted")
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens")
    parser.add_argument("--dtype", choices=_DTYPES, default=_DTYPES[0], help="of adapters' files")
    arguments = parser.parse_args()
    sizes = replace(
        Sizes(prompt=4, answer=6) if arguments.tiny else Sizes(),
        dtype=getattr(torch, arguments.dtype),
    )
    found = machine.describe()
    print(machine.line(found))
    rates: dict[str, dict[str, float]] = {}
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as scratch:
        random_model = Path(scratch) / "model"
        save(shrunk(llama_125m()) if arguments.tiny else llama_125m(), random_model)
        for name, path in (("bundled", demo_model()), ("random 124 M", random_model)):
            measured = _measure(name, path, Path(scratch) / name, sizes, arguments.repeat)
            targets += _report(name, measured)
            rates[name] = {load: ROWS / measured.step_s(load) for load in LOADS}
    print(targets_table(targets))
    print(last_line({"machine": found, "tokens_per_second": rates}, targets))


if __name__ == "__main__":
    main()
