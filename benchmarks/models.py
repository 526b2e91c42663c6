"""Which architectures the engine computes: tokens of tiny random models, and those of transformers.

    python -m benchmarks.models                          # all, some minutes; the last line is JSON
    python -m benchmarks.models "Llama 4" OLMo           # those whose names begin so
    python -m benchmarks.models --write docs/models.md   # into the table of a document

Two prompts are in one batch, computed in chunks, and continued by 24 tokens each. Transformers
computes the same texts one by one, with its plain attention and no cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.architectures import ARCHITECTURES, VOCAB_SIZE, Architecture
from benchmarks.load import Item
from benchmarks.local_engine import LocalEngine
from engine.build import build_engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig, EngineInfo
from engine.protocol.errors import ModelLoadError, first_line

NUM_NEW_TOKENS = 24
_PROMPTS = (40, 47)  # tokens
_CACHE_TOKENS = 1024
_STEP_TOKENS = 64  # less than the prompts together
_CPU = torch.device("cpu")
_HEADER = "| Model | Configuration | Result |"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an architecture.

    Attributes:
        name: the model's.
        kind: its configuration.
        outcome: "same tokens", "refused" or "other tokens".
        note: why it is refused, or what else there is to know; that it takes images, which
            `tests/engine/images` compares.
        seconds: that it took.
    """

    name: str
    kind: str
    outcome: str
    note: str
    seconds: float

    @property
    def row(self) -> str:
        """The result as a row of a table in Markdown."""
        note = f": {self.note}" if self.note else ""
        return f"| {self.name} | `{self.kind}` | {self.outcome}{note} |"


def try_out(architecture: Architecture) -> Result:
    """Compares the engine's tokens with those of transformers."""
    started = time.perf_counter()

    def result(outcome: str, note: str = "") -> Result:
        seconds = round(time.perf_counter() - started, 1)
        return Result(architecture.name, architecture.kind, outcome, note, seconds)

    prompts = make_prompts()
    try:
        actual, info = served(architecture, prompts)
    except ModelLoadError as error:
        return result("refused", _reason(error))
    expected = [continued(architecture.build(), prompt) for prompt in prompts]
    notes = [] if info.attention == "native CPU kernels" else [f"on a CPU, {info.attention}"]
    notes += ["takes images"] if info.takes_images else []
    return result("same tokens" if actual == expected else "other tokens", "; ".join(notes))


def make_prompts() -> list[list[int]]:
    """Two random prompts."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in _PROMPTS
    ]


@torch.inference_mode()
def continued(model: Any, prompt: list[int]) -> list[int]:
    """The likeliest continuation of a prompt by transformers, without a cache."""
    model.set_attn_implementation("eager")
    ids = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def served(
    architecture: Architecture, prompts: list[list[int]]
) -> tuple[list[list[int]], EngineInfo]:
    """The engine's continuations of the prompts in one batch, and what it says of itself.

    Raises:
        ModelLoadError: the model is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model_id=folder,
            socket_path=Path(folder) / "unused.sock",
            device="cpu",
            max_total_tokens=_CACHE_TOKENS // 2,
            max_batch_total_tokens=_CACHE_TOKENS,
            max_step_tokens=_STEP_TOKENS,
            num_threads=1,  # of models so small, more would only wait for each other
        )
        built, info = build_engine(
            config, lambda _: attach_paged_attention(architecture.build(), _CPU, torch.float32)
        )
    run = LocalEngine(built, info.attention).run(Item(prompt, NUM_NEW_TOKENS) for prompt in prompts)
    return list(run.tokens.values()), info


def _reason(error: ModelLoadError) -> str:
    """The error without the name of the model's class, which the row has already."""
    text = first_line(error)
    return text.split(" is not supported: ")[-1]


def chosen(names: Sequence[str]) -> list[Architecture]:
    """The architectures whose names begin with one of these; all without names."""
    return [
        architecture
        for architecture in ARCHITECTURES
        if not names or architecture.name.startswith(tuple(names))
    ]


def write(path: Path, results: Sequence[Result]) -> None:
    """Puts results into the table of a document; rows of other models stay as they are."""
    before, header, rest = path.read_text().partition(_HEADER)
    if not header:
        raise SystemExit(f"{path} has no table with the header {_HEADER}")
    ruler, *lines = rest.strip("\n").split("\n")
    num_rows = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[:num_rows]}
    rows |= {result.name: result.row for result in results}
    table = [rows[one.name] for one in ARCHITECTURES if one.name in rows]
    path.write_text("\n".join([f"{before}{header}", ruler, *table, *lines[num_rows:]]) + "\n")


def main() -> None:
    """Tries architectures and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of names; all models without one")
    parser.add_argument("--write", type=Path, help="a document whose table gets the results")
    parser.add_argument("--tiny", action="store_true", help="one model, for tests")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    results = []
    for architecture in chosen(options.names)[: 1 if options.tiny else None]:
        results.append(try_out(architecture))
        print(results[-1].row, f"{results[-1].seconds} s", flush=True)
    if options.write is not None:
        write(options.write, results)
    print(json.dumps({"models": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
