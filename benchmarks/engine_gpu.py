"""The engine on a GPU: whether it is correct, and how close it is to the ceilings of the device.

One call builds random models of real shapes, compares the engine with the forward of transformers,
and measures, next to the ceilings (memory copied and read, bfloat16 matrix products):

* the shape of Llama-3.1-8B: decoding at 1, 64 and 256 rows with contexts of 1,000 tokens, prefill
  of 8 prompts of 2,048 tokens, the idle time of the device between steps of 64 rows, speculation on
  repetitive text;
* the shape of Qwen3-0.6B: decoding at 1 row, where launching kernels dominates;
* continuous batching of transformers with the same 64 concurrent requests of mixed lengths;
* where there are several GPUs, the first shape's decoding divided among all of them.

    python -m benchmarks.engine_gpu

It needs a torch for that GPU, transformers, llguidance, psutil and tqdm, and nothing from the
network. A part that fails is reported and the other parts go on; the exit status is 1 then.
`--only` runs some parts. `--tiny --device cpu` runs everything within seconds, to see that it
works. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine, speculation, transformers_peers
from benchmarks.ceilings import Reader, copy_bandwidth, matmul_rate
from benchmarks.divided_engine import divided_engine
from benchmarks.load import Item, Load, generated, uniform
from benchmarks.local_engine import LocalEngine, Run, Step, median_seconds
from benchmarks.model_costs import ModelCosts, costs
from benchmarks.random_engine import random_engine, release
from benchmarks.random_model import build, llama_8b, prompt, qwen3_06b, shrunk
from benchmarks.report import table
from benchmarks.timeline import device_busy_s

# How far log-probabilities may be from those of transformers. An output layer in bfloat16 rounds
# logits near 4 to multiples of 1/32, and the layers before it add in another order here. The worst
# of hundreds of tokens counts; where two tokens tie, the errors of both count. A wrong token of a
# random model is off by several units.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.4}
BLOCK_SIZE = 16  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of what is measured, in tokens unless it says otherwise."""

    context: int = 1000
    answer: int = 64
    batches: tuple[int, ...] = (1, 64, 256)  # rows
    idle_batch: int = 64  # rows
    profiled_steps: int = 20  # steps
    prefill: tuple[int, int] = (8, 2048)  # prompts, tokens of each
    checked: tuple[int, ...] = (5, 17, 300, 700)  # tokens of each prompt
    concurrent: int = 64  # requests
    mixed_prompts: tuple[int, int] = (500, 1500)
    mixed_answers: tuple[int, int] = (100, 300)
    step_tokens: int = 8192
    moved_bytes: int = 2**31  # bytes copied, and bytes read
    matmul: int = 8192  # rows and columns
    speculate: int = 6


TINY = Sizes(
    context=24,
    answer=8,
    batches=(1, 4),
    idle_batch=4,
    profiled_steps=3,
    prefill=(2, 48),
    checked=(5, 17, 40),
    concurrent=4,
    mixed_prompts=(10, 30),
    mixed_answers=(4, 8),
    step_tokens=64,
    moved_bytes=2**20,
    matmul=64,
    speculate=3,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A value, and the ceiling it is compared with if there is one."""

    name: str
    value: float
    unit: str
    roof: float | None = None

    def cells(self) -> list[str]:
        """The cells of a table row."""
        roof, share = "-", "-"
        if self.roof:
            roof, share = f"{self.roof:.6g}", f"{self.value / self.roof:.1%}"
        return [self.name, f"{self.value:.6g}", self.unit, roof, share]


@dataclass(slots=True)
class Bench:
    """The device, its ceilings, and the figures so far."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    tiny: bool
    attention: str = ""
    memory_bytes_per_s: float = 0.0
    matmul_flop_per_s: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def llama(self) -> Any:
        """The large shape."""
        return shrunk(llama_8b()) if self.tiny else llama_8b()

    def qwen(self) -> Any:
        """The small shape."""
        return shrunk(qwen3_06b()) if self.tiny else qwen3_06b()

    def note(self, figure: Figure) -> None:
        """Prints a figure and keeps it."""
        self.figures.append(figure)
        tqdm.write("  ".join(figure.cells()), file=sys.stderr)

    def engine(self, config: Any, tokens: int | None, **settings: Any) -> LocalEngine:
        """An engine with these settings, over those of `settings`."""
        chosen = self.settings(config, tokens) | settings
        local = random_engine(config, self.device, self.dtype, **chosen)
        self.attention = local.attention
        return local

    def settings(self, config: Any, tokens: int | None) -> dict[str, Any]:
        """Of an engine whose cache holds `tokens`, or as many as the device has room for.

        Prompts may fill a step next to the sequences that decode; otherwise these would end before
        the last prompt is computed.
        """
        return {
            "block_size": BLOCK_SIZE,
            "max_total_tokens": min(4096, config.max_position_embeddings),
            "max_batch_total_tokens": tokens and max(tokens, 4096),
            "max_step_tokens": self.sizes.step_tokens,
            "max_chunk_tokens": self.sizes.step_tokens,
            "enable_prefix_caching": False,  # no prompt may be answered from a cache
            "num_threads": 1 if self.tiny else None,
        }

    def decode_roof(self, shape: ModelCosts, batch: int, context: float) -> float:
        """The most tokens per second, limited by memory or by arithmetic."""
        by_memory = shape.decode_bytes(batch, context) / self.memory_bytes_per_s
        by_arithmetic = shape.decode_flops(batch, context) / self.matmul_flop_per_s
        return batch / max(by_memory, by_arithmetic)


def ceilings(bench: Bench) -> None:
    """Measures the ceilings of the device, which all other figures are compared with."""
    size = bench.sizes.matmul
    copied = copy_bandwidth(bench.sizes.moved_bytes, bench.device)
    read = Reader(bench.sizes.moved_bytes, bench.device).bandwidth(repeats=10)
    bench.memory_bytes_per_s = max(copied, read)
    shapes = [(size, size, size), (size, size // 2, 2 * size)]
    bench.matmul_flop_per_s = matmul_rate(shapes, bench.dtype, bench.device, repeats=10)
    bench.note(Figure("memory copied", copied / 1e9, "GB/s"))
    bench.note(Figure("memory read", read / 1e9, "GB/s"))
    bench.note(Figure("matrix products", bench.matmul_flop_per_s / 1e12, "TFLOP/s"))


def correct_large(bench: Bench) -> None:
    """Compares the 8B shape with transformers."""
    _check(bench, bench.llama(), "8B")


def correct_small(bench: Bench) -> None:
    """Compares the 0.6B shape with transformers."""
    _check(bench, bench.qwen(), "0.6B")


def _check(bench: Bench, config: Any, name: str) -> None:
    """Notes the largest difference from transformers.

    Raises:
        ArithmeticError: it is above the tolerance.
    """
    worst, tolerance = max(_differences(bench, config)), TOLERANCE[bench.dtype]
    bench.note(Figure(f"{name}: log-probabilities off by at most", worst, ""))
    if not worst <= tolerance:  # true for NaN as well
        raise ArithmeticError(f"{name}: log-probabilities are off by {worst} > {tolerance}")


def _differences(bench: Bench, config: Any) -> Iterator[float]:
    """Differences of log-probabilities from those of transformers, two values per prompt.

    The first is how far those of the generated tokens are off, the second how far below the best
    token of transformers they are. Prompts are computed in chunks and answers in a batch, so that
    all paths through the cache are used. Transformers gets the tokens of the engine as input, so a
    tie that falls differently does not make the following tokens incomparable.
    """
    lengths, vocab = bench.sizes.checked, config.vocab_size
    items = [Item(prompt(n, n, vocab), bench.sizes.answer) for n in lengths]
    local = bench.engine(config, 8192, max_step_tokens=max(lengths) // 3)
    run = local.run(items)
    model = build(config, bench.device, bench.dtype)
    found = zip(items, run.tokens.values(), run.logprobs.values(), strict=True)
    for item, tokens, logprobs in found:
        expected = _logprobs(model, item.prompt, tokens)  # [tokens, vocab]
        chosen = expected.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        yield float((chosen - torch.tensor(logprobs)).abs().max())
        yield float((expected.amax(dim=1) - chosen).max())


@torch.inference_mode()
def _logprobs(model: Any, prompt_ids: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of transformers at the positions of `tokens`, float32 [tokens, vocab]."""
    ids = torch.tensor([prompt_ids + tokens[:-1]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def large_model(bench: Bench) -> None:
    """Prefill, decoding and idle time on the 8B shape."""
    config, sizes = bench.llama(), bench.sizes
    shape = costs(config, bench.dtype)
    local = bench.engine(config, None)
    room = local.engine.stats().num_blocks * BLOCK_SIZE
    _prefill(bench, local, config, shape)
    for batch in sizes.batches:
        if batch * (_decode_load(bench, config, batch).max_tokens + BLOCK_SIZE) > room:
            bench.errors[f"8B, {_rows(batch)}"] = f"a KV cache of {room} tokens is too small"
            continue
        _decode(bench, local, config, shape, batch, "8B")
    _idle(bench, local, config, sizes.idle_batch, "8B")


def small_model(bench: Bench) -> None:
    """Decoding one row on the 0.6B shape."""
    config = bench.qwen()
    local = bench.engine(config, 8192)
    _decode(bench, local, config, costs(config, bench.dtype), 1, "0.6B")
    _idle(bench, local, config, 1, "0.6B")


def divided(bench: Bench) -> None:
    """Decoding on the 8B shape, divided among all GPUs; nothing where there is one."""
    num_gpus = torch.cuda.device_count() if bench.device.type == "cuda" else 1
    if num_gpus < 2:
        return
    config, name = bench.llama(), f"8B on {num_gpus} GPUs"
    with divided_engine(config, bench.dtype, num_gpus, **bench.settings(config, None)) as local:
        for batch in bench.sizes.batches:
            load = _decode_load(bench, config, batch)
            _warm_up(local, config, batch)
            steps = local.run(load.items(batch)).decode_steps(batch)
            rate = batch / median_seconds(steps)
            bench.note(Figure(f"{name}, decode, {_rows(batch)}", rate, "tokens/s"))


def peer(bench: Bench) -> None:
    """Continuous batching of transformers, with the same requests on the same device."""
    config, sizes = bench.llama(), bench.sizes
    load = Load(sizes.mixed_prompts, sizes.mixed_answers, config.vocab_size)
    ours = _ours(bench, config, load)
    release(bench.device)
    bench.note(Figure(f"8B, {sizes.concurrent} mixed requests", ours, "tokens/s"))
    theirs = _theirs(bench, config, load)
    bench.note(Figure("transformers continuous batching, the same", theirs, "tokens/s"))
    bench.note(Figure("times as fast", ours / theirs, "x"))


def _ours(bench: Bench, config: Any, load: Load) -> float:
    """Tokens per second of the mixed load on the engine, with its default chunks."""
    count = bench.sizes.concurrent
    tokens = count * (load.max_tokens + BLOCK_SIZE)
    local = bench.engine(config, tokens, max_chunk_tokens=None)
    _warm_up(local, config, count)
    items = load.items(count)
    return generated(items) / local.run(items).seconds


def _theirs(bench: Bench, config: Any, load: Load) -> float:
    """Tokens per second of the mixed load on transformers."""
    count = bench.sizes.concurrent
    model = build(config, bench.device, bench.dtype)
    limits = (load.prompt_tokens[1], load.new_tokens[1], count)
    with transformers_peers.continuous(model, *limits) as manager:
        warm_up = uniform(16, 4, config.vocab_size).items(count)
        transformers_peers.run_continuous(manager, warm_up)
        seconds, num_tokens = transformers_peers.run_continuous(manager, load.items(count))
    return num_tokens / seconds


def speculate(bench: Bench) -> None:
    """What speculation gains on repetitive text, at one row of the 8B shape."""
    rates = {size: _speculation_rate(bench, size) for size in (0, bench.sizes.speculate)}
    off, on = rates.values()
    bench.note(Figure("8B, 1 row, repetitive, no speculation", off, "tokens/s"))
    bench.note(Figure(f"{bench.sizes.speculate} draft tokens", on, "tokens/s"))
    bench.note(Figure("times as fast", on / off, "x"))


def _speculation_rate(bench: Bench, size: int) -> float:
    """Tokens per second with `size` draft tokens: the better of two rounds after a warm-up."""
    config = bench.llama()
    local = bench.engine(config, 8192, speculate=size)
    rates = []
    for number in range(3):
        todo = speculation.requests(speculation.REPETITIVE, 1, number, config.vocab_size)
        _, rate, _ = speculation.run(local.engine, todo)
        rates.append(rate)
    del local
    release(bench.device)
    return max(rates[1:])


def _warm_up(local: LocalEngine, config: Any, count: int) -> None:
    """Lets the engine compile and capture everything that happens on first use."""
    local.run(uniform(16, 6, config.vocab_size).items(count))


def _decode(
    bench: Bench, local: LocalEngine, config: Any, shape: ModelCosts, batch: int, name: str
) -> None:
    """Measures decoding of `batch` rows."""
    load = _decode_load(bench, config, batch)
    _warm_up(local, config, batch)
    steps = local.run(load.items(batch)).decode_steps(batch)
    name = f"{name}, decode, {_rows(batch)}"
    if not steps:
        bench.errors[name] = "no step decoded all rows and nothing else"
        return
    roof = bench.decode_roof(shape, batch, bench.sizes.context + load.new_tokens[0] / 2)
    bench.note(Figure(name, batch / median_seconds(steps), "tokens/s", roof))


def _decode_load(bench: Bench, config: Any, batch: int) -> Load:
    """A load whose answers are so long that none ends before the last prompt is computed."""
    sizes = bench.sizes
    num_steps = batch * sizes.context // max(1, sizes.step_tokens - batch) + 2
    return uniform(sizes.context, sizes.answer + num_steps, config.vocab_size)


def _rows(batch: int) -> str:
    return "1 row" if batch == 1 else f"{batch} rows"


def _prefill(bench: Bench, local: LocalEngine, config: Any, shape: ModelCosts) -> None:
    """Measures prefill: the best of three runs."""
    count, length = bench.sizes.prefill
    load = uniform(length, 1, config.vocab_size)
    seconds = min(local.run(load.items(count)).seconds for _ in range(3))
    flops = shape.prefill_flops([length] * count)
    name = f"8B, prefill, {count} x {length}"
    bench.note(Figure(f"{name}", count * length / seconds, "tokens/s"))
    roof = bench.matmul_flop_per_s / 1e12
    bench.note(Figure(f"{name}, computed", flops / seconds / 1e12, "TFLOP/s", roof))


def _idle(bench: Bench, local: LocalEngine, config: Any, batch: int, name: str) -> None:
    """Measures how long the device is idle in a decode step."""
    count = bench.sizes.profiled_steps
    load = uniform(min(bench.sizes.context, 512), 2 * count + 16, config.vocab_size)
    run = local.start(load.items(batch))
    while local.engine.has_work and len(run.decode_steps(batch)) < count + 2:
        local.step(run)
    steps = run.decode_steps(batch)[2:]
    busy = device_busy_s(lambda: _some_steps(local, run, count), bench.device)
    profiled = len(run.decode_steps(batch)) - 2 - len(steps)
    while local.engine.has_work:
        local.step(run)
    name = f"{name}, {_rows(batch)}"
    if len(steps) < count or (bench.device.type == "cuda" and profiled < count):
        found = f"{len(steps)} full steps, and {profiled} with the profiler"
        bench.errors[f"{name}, a step"] = f"{found}, instead of {count}"
        return
    _note_idle(bench, name, steps, None if busy is None else busy / count)


def _note_idle(bench: Bench, name: str, steps: Sequence[Step], busy: float | None) -> None:
    """Notes the duration of a step, and how much of it the device was idle.

    Args:
        bench: takes the figures.
        name: what they are of.
        steps: decode steps without the profiler.
        busy: seconds of a step in which the device computes; None if the profiler saw no kernel.
    """
    seconds = median_seconds(steps)
    bench.note(Figure(f"{name}, a step", seconds * 1000, "ms"))
    if busy is not None:
        idle = max(0.0, seconds - busy)
        bench.note(Figure(f"{name}, device idle per step", idle * 1000, "ms", seconds * 1000))
    elif bench.device.type == "cuda":
        bench.errors[f"{name}, device idle per step"] = "the profiler saw no kernel"
    else:  # on a CPU: what the host does beside the forward
        forward = statistics.median(step.output.forward_s for step in steps)
        bench.note(Figure(f"{name}, beside the forward", (seconds - forward) * 1000, "ms"))


def _some_steps(local: LocalEngine, run: Run, count: int) -> None:
    """Computes `count` steps."""
    for _ in range(count):
        local.step(run)


PARTS: dict[str, Callable[[Bench], None]] = {
    "correct_large": correct_large,
    "correct_small": correct_small,
    "large": large_model,
    "small": small_model,
    "speculation": speculate,
    "peer": peer,
    "divided": divided,
}


def measure(bench: Bench, parts: Sequence[str]) -> None:
    """Runs the parts; one that fails is recorded as an error, and the next part runs."""
    ceilings(bench)
    for name in tqdm(parts, desc="parts", file=sys.stderr):
        started = time.perf_counter()
        try:
            PARTS[name](bench)
        except Exception as error:
            traceback.print_exc()
            bench.errors[name] = f"{type(error).__name__}: {error}"[:500]
            traceback.clear_frames(error.__traceback__)  # whose frames hold the models
        release(bench.device)
        tqdm.write(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def main() -> None:
    """Checks, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="only to see that everything runs")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --tiny --device cpu shows that the script runs")
    name = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    sizes = TINY if arguments.tiny else Sizes()
    bench = Bench(device, getattr(torch, name), sizes, arguments.tiny)
    described = machine.describe(device)
    print(f"{machine.line(described)}, {name}", flush=True)
    measure(bench, arguments.only)
    print(f"\nattention: {bench.attention}\n")
    print(table(["", "measured", "", "roof", "of it"], [item.cells() for item in bench.figures]))
    for part, error in bench.errors.items():
        print(f"FAILED: {part}: {error}")
    figures = [asdict(figure) for figure in bench.figures]
    result = {"dtype": name, "tiny": bench.tiny, "figures": figures, "errors": bench.errors}
    print(json.dumps({"machine": described, "attention": bench.attention, **result}))
    sys.exit(1 if bench.errors else 0)


if __name__ == "__main__":
    main()
