"""Long contexts: what attention to them takes of a step, and what finding a cached prefix costs.

On a random Llama of 124 M in float32, one engine:

* decoding at 1 and 8 rows with contexts from 1,024 to 32,768 tokens each: the time of a step, the
  share that the context takes (against a context of one block), and the share of the memory roof,
  against reads of as many bytes right before;
* planning the first step of a prompt while 10,000 blocks are cached: none of it known, and all.

Prompts are not computed: the cache is filled with a number, and what a step costs does not depend
on which. To compute 8 times 32,768 tokens would take half an hour.

    .venv/bin/python -m benchmarks.long_contexts

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ceilings import Reader
from benchmarks.load import Item, Load, uniform
from benchmarks.local_engine import LocalEngine, median_seconds
from benchmarks.model_costs import ModelCosts, costs
from benchmarks.random_model import llama_125m, prompt, save, shrunk
from benchmarks.report import last_line, table
from engine.batch.model_input import ModelInput
from engine.computation.computation import Computation, build_computation
from engine.engine import Engine
from engine.executor import Forward
from engine.protocol.config import EngineConfig
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler

BATCHES = (1, 8)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of what is measured, in tokens unless it says otherwise."""

    contexts: tuple[int, ...] = (16, 1024, 8192, 32_768)
    steps: int = 12  # of a measurement
    cached_blocks: int = 10_000
    prompts: tuple[int, ...] = (512, 4096, 32_000)  # whose blocks are looked up


TINY = Sizes(contexts=(16, 64), steps=3, cached_blocks=40, prompts=(64,))


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A measurement of decoding: seconds of a step, and the least by the memory's speed."""

    batch: int
    context: int
    seconds: float
    roof_s: float


@dataclass(frozen=True, slots=True)
class LookupRow:
    """Seconds of planning the first step of a prompt, which is not cached or all cached."""

    num_tokens: int
    unknown_s: float
    cached_s: float


class DecodingOnly:
    """A forward pass that leaves out steps with prompts, whose logits are zeros.

    Args:
        forward: computes the others.
        vocab_size: of the logits.
    """

    def __init__(self, forward: Forward, vocab_size: int) -> None:
        self._forward = forward
        self._vocab_size = vocab_size

    def __call__(self, batch: ModelInput) -> Tensor:
        """The logits of the wanted rows."""
        if len(batch.input_ids) == len(batch.logits_rows):
            return self._forward(batch)
        return torch.zeros(len(batch.logits_rows), self._vocab_size)


def engine(built: Computation, num_blocks: int, max_prompt: int, *, caches: bool) -> Engine:
    """An engine in which a whole prompt is a step."""
    blocks = BlockManager(num_blocks, built.config.block_size, enable_prefix_caching=caches)
    step_tokens = max_prompt + BATCHES[-1]
    scheduler = Scheduler(blocks, max_step_tokens=step_tokens, max_num_seqs=BATCHES[-1])
    forward = DecodingOnly(built.forward, built.vocab_size)
    return Engine(forward, scheduler, CPU, vocab_size=built.vocab_size)


def decode(
    local: LocalEngine, reader: Reader, model: ModelCosts, load: Load, batch: int
) -> DecodeRow:
    """Measures decoding steps of `batch` rows."""
    context = load.prompt_tokens[0]
    run = local.run(load.items(batch))
    bandwidth = reader.bandwidth(3)
    seconds = median_seconds(run.decode_steps(batch)[1:])
    return DecodeRow(batch, context, seconds, model.decode_bytes(batch, context) / bandwidth)


def fill(local: LocalEngine, num_tokens: int, vocab_size: int) -> None:
    """Has so many tokens of prompts cached."""
    length = num_tokens // 8
    for salt in range(8):
        local.run([Item(prompt(length, 10_000 + salt, vocab_size), 1)])


def look_up(local: LocalEngine, num_tokens: int, vocab_size: int) -> LookupRow:
    """Measures planning of prompts."""
    items = [Item(prompt(num_tokens, 20_000 + salt, vocab_size), 1) for salt in range(3)]
    first, again = (_planning_s(local, items) for _ in range(2))
    return LookupRow(num_tokens, first, again)


def _planning_s(local: LocalEngine, items: Sequence[Item]) -> float:
    """The median of the seconds of planning."""
    runs = [local.run([item]) for item in items]
    return statistics.median(run.steps[0].output.schedule_s for run in runs)


def measure(
    built: Computation, model: ModelCosts, sizes: Sizes
) -> tuple[list[DecodeRow], list[LookupRow]]:
    """All measurements."""
    longest = max(*sizes.contexts, *sizes.prompts)
    num_blocks = built.runner.cache.num_blocks
    for keys, values in built.runner.cache.layers.values():
        keys.fill_(0.01)  # pages that were never written are all the same one
        values.fill_(0.01)
    local = LocalEngine(engine(built, num_blocks, longest * BATCHES[-1], caches=False), "")
    reader = Reader(model.weight_bytes, CPU)
    vocab_size = built.vocab_size
    loads = [uniform(context, sizes.steps + 1, vocab_size) for context in sizes.contexts]
    decoded = [decode(local, reader, model, load, batch) for batch in BATCHES for load in loads]
    caching = LocalEngine(engine(built, num_blocks, longest * BATCHES[-1], caches=True), "")
    fill(caching, sizes.cached_blocks * built.config.block_size, vocab_size)
    return decoded, [look_up(caching, size, vocab_size) for size in sizes.prompts]


def report(decoded: Sequence[DecodeRow], looked_up: Sequence[LookupRow], block_size: int) -> str:
    """Both tables as text."""
    shortest = {row.batch: row.seconds for row in reversed(decoded)}
    rows = [
        [
            f"{row.batch} x {row.context}",
            f"{row.seconds * 1000:.2f}",
            f"{row.batch / row.seconds:.1f}",
            f"{1 - shortest[row.batch] / row.seconds:.0%}",
            f"{row.roof_s / row.seconds:.0%}",
        ]
        for row in decoded
    ]
    header = ["rows x context", "ms/step", "tokens/s", "of it the context", "of the memory roof"]
    found = [
        [
            str(row.num_tokens),
            str(row.num_tokens // block_size),
            f"{row.unknown_s * 1e6:.0f}",
            f"{row.cached_s * 1e6:.0f}",
        ]
        for row in looked_up
    ]
    second = ["prompt, tokens", "blocks", "µs to plan, unknown", "µs to plan, cached"]
    return f"{table(header, rows)}\n\n{table(second, found)}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    options = parser.parse_args()
    model, sizes = llama_125m(), Sizes()
    if options.tiny:
        model, sizes = shrunk(model), TINY
    longest = max(*sizes.contexts, *sizes.prompts) + 2 * sizes.steps
    model.max_position_embeddings = longest
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        config = EngineConfig(
            model_id=folder,
            socket_path=Path(folder) / "unused.sock",
            max_total_tokens=longest,
            max_batch_total_tokens=BATCHES[-1] * (longest + 64),  # blocks may be part empty
        )
        built = build_computation(config)
    described = machine.describe()
    print(machine.line(described), flush=True)
    decoded, looked_up = measure(built, costs(model, torch.float32), sizes)
    print(f"\n{report(decoded, looked_up, built.config.block_size)}\n")
    result = {
        "machine": described,
        "decode": [asdict(row) for row in decoded],
        "lookup": [asdict(row) for row in looked_up],
    }
    print(last_line(result, []))


if __name__ == "__main__":
    main()
