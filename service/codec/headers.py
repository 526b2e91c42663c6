"""The x-* response headers that TGI's clients and proxies read; gRPC callers get them as metadata.

Names and meanings are those of router/src/server.rs at v2.1.1. A stream's headers are sent before
its first token, so they hold only what is known by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..generation.generator import Generation
from ..generation.parameters import Prompt

Headers = dict[str, str]


def of_generation(result: Generation, compute_type: str) -> Headers:
    """Headers of one finished generation: times in seconds, per token in whole milliseconds."""
    return {
        "x-compute-type": compute_type,
        "x-compute-time": str(result.timings.total),
        **_summed([result]),
    }


def of_generations(results: list[Generation], compute_type: str) -> Headers:
    """Headers of several prompts in one request: every figure is a sum."""
    return {"x-compute-type": compute_type, **_summed(results)}


def of_stream(prompts: Sequence[Prompt], compute_type: str) -> Headers:
    """Headers of a stream."""
    num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": str(num_characters),
        "x-accel-buffering": "no",
        "cache-control": "no-cache",
    }


def _summed(results: list[Generation]) -> Headers:
    timings = [result.timings for result in results]
    per_token = [
        int(1000 * result.timings.inference / max(len(result.tokens), 1)) for result in results
    ]
    return {
        "x-compute-characters": str(sum(len(result.request.inputs) for result in results)),
        "x-total-time": str(sum(item.total for item in timings)),
        "x-validation-time": str(sum(item.validation for item in timings)),
        "x-queue-time": str(sum(item.queue for item in timings)),
        "x-inference-time": str(sum(item.inference for item in timings)),
        "x-time-per-token": str(sum(per_token)),
        "x-prompt-tokens": str(sum(result.num_prompt_tokens for result in results)),
        "x-generated-tokens": str(sum(len(result.tokens) for result in results)),
    }
