"""Runs loads on OpenVINO GenAI's continuous batching; a process in an environment of its own.

    python openvino_worker.py MODEL.gguf PRECISION THREADS

Speaks as `peer_process` says. Imports nothing of this project, which is not installed there.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

_CACHE_GIB = 1
_MAX_STREAMS = 64


def pipeline(model: str, precision: str, threads: int) -> Any:
    """The pipeline, without a prefix cache; keys and values in the precision of the model."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = _MAX_STREAMS
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
    }
    return openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)


def run(pipe: Any, items: list[tuple[list[int], int]], ids: Any) -> dict[str, Any]:
    """Runs all items at once, greedy, to their full lengths.

    Raises:
        RuntimeError: tokens are missing.
    """
    started = time.perf_counter()
    handles = []
    for prompt, new_tokens in items:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
        handles.append(pipe.add_request(next(ids), tokens, config))
    arrivals: list[list[float]] = [[] for _ in items]
    while pipe.has_non_finished_requests():
        pipe.step()
        now = time.perf_counter() - started
        for handle, times in zip(handles, arrivals, strict=True):
            while handle.can_read():
                times += [now] * sum(len(part.generated_ids) for part in handle.read().values())
    seconds = time.perf_counter() - started
    if [len(times) for times in arrivals] != [new_tokens for _, new_tokens in items]:
        raise RuntimeError(f"{[len(times) for times in arrivals]} tokens")
    return {"seconds": seconds, "arrivals": arrivals}


def main() -> None:
    """Answers until its input ends."""
    pipe = pipeline(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    ids = itertools.count()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipe, json.loads(line), ids)), flush=True)


if __name__ == "__main__":
    main()
