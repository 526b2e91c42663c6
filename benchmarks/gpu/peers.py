"""Step 6: others on the same device with the same shape and load, in one run.

Requests of 1,000 tokens with answers of 200, 64 and 256 at once, on a random model of the shape of
Llama-3.1-8B in bfloat16: this engine; vLLM and SGLang where they are installed, with weights they
make themselves; continuous batching of transformers; and a single stream on a compiled static
cache, as gpt-fast does it, beside this engine's single stream.

    python -m benchmarks.gpu.peers

Each runs in a process of its own, so that all find an empty device. A peer that is not installed is
noted as absent, which is no error. Figures are tokens per second of wall clock, prompts included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import transformers_peers
from benchmarks.ceilings import synchronise
from benchmarks.gpu import saved_model
from benchmarks.gpu.child import finished
from benchmarks.gpu.results import Results, arguments
from benchmarks.load import Item, generated, uniform
from benchmarks.random_engine import random_engine
from benchmarks.random_model import build, llama_8b, shrunk
from benchmarks.report import table
from engine.cuda_segments import VARIABLE

_LIMIT_S = 240.0  # of a peer, its start included
_ALONE = 1  # stream


@dataclass(frozen=True, slots=True)
class Task:
    """What every peer does.

    Attributes:
        path: of a directory with the configuration and a tokenizer, without weights.
        device: where.
        is_smoke: tiny sizes.
        counts: requests at once.
    """

    path: Path
    device: torch.device
    is_smoke: bool
    counts: tuple[int, ...]

    @property
    def config(self) -> Any:
        """The model's shape."""
        return shrunk(llama_8b()) if self.is_smoke else llama_8b()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def items(self, count: int) -> list[Item]:
        """New requests."""
        prompt, answer = (12, 6) if self.is_smoke else (1000, 200)
        return uniform(prompt, answer, self.config.vocab_size).items(count)

    def rates(self, run: Callable[[list[Item]], float]) -> dict[str, float]:
        """Tokens per second by number of requests; the second of two rounds counts."""
        found = {}
        for count in self.counts:
            items = [self.items(count) for _ in range(2)]
            seconds = [run(requests) for requests in items]
            found[str(count)] = generated(items[1]) / seconds[1]
        return found


def ours(task: Task) -> dict[str, float]:
    """This engine."""
    local = random_engine(
        task.config,
        task.device,
        task.dtype,
        max_total_tokens=64 if task.is_smoke else 2048,
        enable_prefix_caching=False,
    )
    return task.rates(lambda items: local.run(items).seconds)


def vllm(task: Task) -> dict[str, float]:
    """The engine of vLLM, in this process."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(task.path),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=2048,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.9,
    )

    def run(items: list[Item]) -> float:
        started = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": item.prompt} for item in items],
            SamplingParams(
                temperature=0.0, max_tokens=items[0].new_tokens, ignore_eos=True, detokenize=False
            ),
            use_tqdm=False,
        )
        return time.perf_counter() - started

    return task.rates(run)


def sglang(task: Task) -> dict[str, float]:
    """SGLang's engine."""
    import sglang

    engine = sglang.Engine(
        model_path=str(task.path),
        load_format="dummy",
        dtype="bfloat16",
        context_length=2048,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
    )

    def run(items: list[Item]) -> float:
        params = {"temperature": 0.0, "max_new_tokens": items[0].new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        engine.generate(input_ids=[item.prompt for item in items], sampling_params=params)
        return time.perf_counter() - started

    try:
        return task.rates(run)
    finally:
        engine.shutdown()


def transformers(task: Task) -> dict[str, float]:
    """Continuous batching of transformers."""
    model = build(task.config, task.device, task.dtype)
    sizes, count = task.items(1)[0], max(task.counts)
    limits = (len(sizes.prompt), sizes.new_tokens, count)
    with transformers_peers.continuous(model, *limits) as manager:
        return task.rates(lambda items: transformers_peers.run_continuous(manager, items)[0])


def static_cache(task: Task) -> dict[str, float]:
    """One stream of bare torch: a static cache and a compiled step, which is decoded greedily."""
    from transformers import StaticCache

    model = build(task.config, task.device, task.dtype)
    (item,) = task.items(_ALONE)
    longest = len(item.prompt) + item.new_tokens
    cache = StaticCache(config=model.config, max_cache_len=longest)

    @torch.inference_mode()
    def step(ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        output = model(
            input_ids=ids,
            position_ids=position[None],
            past_key_values=cache,
            cache_position=position,
            use_cache=True,
        )
        return output.logits[:, -1:].argmax(-1)

    decode = step if task.is_smoke else torch.compile(step, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def run(items: list[Item]) -> float:
        cache.reset()
        ids = torch.tensor([items[0].prompt], device=task.device)
        started = time.perf_counter()
        token = step(ids, torch.arange(ids.shape[1], device=task.device)).clone()
        for place in range(ids.shape[1], longest - 1):
            token = decode(token, torch.tensor([place], device=task.device)).clone()
        synchronise(task.device)
        return time.perf_counter() - started

    run(task.items(_ALONE))  # compiles
    return Task(task.path, task.device, task.is_smoke, (_ALONE,)).rates(run)


ARMS: dict[str, tuple[Callable[[Task], dict[str, float]], str]] = {
    "ours": (ours, "torch"),
    "vllm": (vllm, "vllm"),
    "sglang": (sglang, "sglang"),
    "transformers": (transformers, "transformers"),
    "static_cache": (static_cache, "torch"),
}


def measure(results: Results, path: Path, arm: str, is_smoke: bool) -> None:
    """Runs an arm in a process of its own."""
    _, package = ARMS[arm]
    if importlib.util.find_spec(package) is None:
        results.note(arm, {"absent": f"{package} is not installed"})
        return
    command = [sys.executable, "-m", "benchmarks.gpu.peers", "--arm", arm, "--path", str(path)]
    command += ["--device", results.device.type, *(["--smoke"] if is_smoke else [])]
    # Others run as they are by themselves, without the setting of this engine's process.
    allocator = {} if arm == "ours" else {VARIABLE: "expandable_segments:False"}
    limit_s = max(10.0, min(_LIMIT_S, results.left_s))
    ended = finished(command, limit_s, os.environ | allocator)
    if ended.returncode:
        raise RuntimeError(f"{arm}: {(ended.stderr or ended.stdout).strip()[-800:]}")
    results.note(arm, json.loads(ended.stdout.splitlines()[-1]))


def one_arm(argv: list[str]) -> int:
    """The process of an arm: prints its figures as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=list(ARMS), required=True)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--smoke", action="store_true")
    found = parser.parse_args(argv)
    counts = (1, 2) if found.smoke else (1, 64, 256)
    task = Task(found.path, torch.device(found.device), found.smoke, counts)
    run, _ = ARMS[found.arm]
    print(json.dumps(run(task)), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs all arms; the status is 1 if one fails that is installed."""
    given = sys.argv[1:] if argv is None else argv
    if "--arm" in given:
        return one_arm(given)
    assert __doc__ is not None
    found = arguments(__doc__, argv, only=list(ARMS))
    results = Results("peers", found)
    config = shrunk(llama_8b()) if found.smoke else llama_8b()
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        saved_model.save_tokenizer(config.vocab_size, Path(folder))
        for arm in found.only:
            with results.part(arm):
                measure(results, Path(folder), arm, found.smoke)
    _compare(results)
    return results.finish()


def _compare(results: Results) -> None:
    """Notes how many times as fast this engine is as each peer."""
    mine = results.parts.get("ours", {})
    ratios = {
        arm: {count: mine[count] / rate for count, rate in rates.items() if count in mine}
        for arm, rates in results.parts.items()
        if arm != "ours" and "absent" not in rates
    }
    results.note("ours_to_peer", ratios)
    rows = [
        [arm, count, f"{results.parts[arm][count]:.1f}", f"{ratio:.2f}"]
        for arm, found in ratios.items()
        for count, ratio in found.items()
    ]
    print(table(["peer", "requests", "tokens/s", "ours to it"], rows))


if __name__ == "__main__":
    sys.exit(main())
