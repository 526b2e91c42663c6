"""Runs loads on CTranslate2's generator; a process in an environment of its own.

    python ctranslate2_worker.py MODEL PRECISION THREADS

Speaks as `peer_process` says. Imports nothing of this project, which is not installed there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2


def run(generator: Any, words: list[str], items: list[tuple[list[int], int]]) -> dict[str, Any]:
    """Runs all items as one batch, greedy; a stream leaves it with its last token.

    Raises:
        RuntimeError: tokens are missing.
    """
    lengths = [new_tokens for _, new_tokens in items]
    arrivals: list[list[float]] = [[] for _ in items]
    started = time.perf_counter()

    def arrived(step: Any) -> bool:
        arrivals[step.batch_id].append(time.perf_counter() - started)
        return len(arrivals[step.batch_id]) >= lengths[step.batch_id]

    generator.generate_batch(
        [[words[token] for token in prompt] for prompt, _ in items],
        max_length=max(lengths),
        min_length=max(lengths),
        sampling_topk=1,
        include_prompt_in_result=False,
        callback=arrived,
    )
    seconds = time.perf_counter() - started
    if [len(times) for times in arrivals] != lengths:
        raise RuntimeError(f"{[len(times) for times in arrivals]} tokens")
    return {"seconds": seconds, "arrivals": arrivals}


def main() -> None:
    """Answers until its input ends."""
    model, precision, threads = sys.argv[1:]
    generator = ctranslate2.Generator(
        model, device="cpu", compute_type=precision, inter_threads=1, intra_threads=int(threads)
    )
    words = json.loads(Path(model, "vocabulary.json").read_text())
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(generator, words, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
