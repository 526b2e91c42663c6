"""Runs loads on vLLM's engine; a process in an environment of its own.

    python vllm_worker.py MODEL DTYPE TOKENS_OF_A_STREAM

Speaks as `peer_process` says. Imports nothing of this project, which is not installed there.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

_MAX_STREAMS = 64


def engine(model: str, dtype: str, room: int) -> Any:
    """The engine, without a prefix cache and without compiling."""
    arguments = EngineArgs(
        model=model,
        dtype=dtype,
        max_model_len=room,
        max_num_seqs=_MAX_STREAMS,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    return LLMEngine.from_engine_args(arguments)


def run(llm: Any, items: list[tuple[list[int], int]], ids: Any) -> dict[str, Any]:
    """Runs all items at once, greedy, to their full lengths.

    Raises:
        RuntimeError: tokens are missing.
    """
    started = time.perf_counter()
    arrivals: dict[str, list[float]] = {}
    for prompt, new_tokens in items:
        name = f"bench-{next(ids)}"
        arrivals[name] = []
        llm.add_request(name, {"prompt_token_ids": prompt}, _parameters(new_tokens))
    while llm.has_unfinished_requests():
        outputs = llm.step()
        now = time.perf_counter() - started
        for output in outputs:
            arrivals[output.request_id] += [now] * len(output.outputs[0].token_ids)
    seconds = time.perf_counter() - started
    streams = list(arrivals.values())
    if [len(times) for times in streams] != [new_tokens for _, new_tokens in items]:
        raise RuntimeError(f"{[len(times) for times in streams]} tokens")
    return {"seconds": seconds, "arrivals": streams}


def _parameters(new_tokens: int) -> Any:
    return SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def main() -> None:
    """Answers until its input ends; what vLLM prints goes to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = engine(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    ids = itertools.count()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(llm, json.loads(line), ids)), file=answers, flush=True)


if __name__ == "__main__":
    main()
