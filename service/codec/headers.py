"""The x-* response headers that TGI's clients and proxies read; gRPC callers get them as metadata.

Names and meanings are those of router/src/server.rs at v2.1.1. A stream's headers are sent before
its first token, so they hold only what is known by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..generation.generation import Generation
from ..generation.parameters import Prompt

Headers = dict[str, str]


def of_generation(result: Generation, compute_type: str) -> Headers:
    """Headers of one finished generation: times in seconds, per token in whole milliseconds."""
    return of_choices([result], compute_type)


def of_choices(results: list[Generation], compute_type: str) -> Headers:
    """Headers of several answers to one prompt, which is counted once."""
    return {
        "x-compute-type": compute_type,
        "x-compute-time": str(max(result.timings.total for result in results)),
        **_summed(results),
        **_of_prompts(results[:1]),
    }


def of_generations(prompts: list[list[Generation]], compute_type: str) -> Headers:
    """Headers of several prompts in one request: every figure is a sum."""
    results = [result for choices in prompts for result in choices]
    firsts = [choices[0] for choices in prompts]
    return {"x-compute-type": compute_type, **_summed(results), **_of_prompts(firsts)}


def of_whole() -> Headers:
    """Headers of a whole reply without figures: whoever passes it on may hold it until its end."""
    return {"x-accel-buffering": "yes"}


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
        "x-total-time": str(sum(item.total for item in timings)),
        "x-validation-time": str(sum(item.validation for item in timings)),
        "x-queue-time": str(sum(item.queue for item in timings)),
        "x-inference-time": str(sum(item.inference for item in timings)),
        "x-time-per-token": str(sum(per_token)),
        "x-generated-tokens": str(sum(len(result.tokens) for result in results)),
    }


def _of_prompts(results: list[Generation]) -> Headers:
    """The figures of prompts, from one generation of each."""
    return {
        "x-compute-characters": str(sum(len(result.request.inputs) for result in results)),
        "x-prompt-tokens": str(sum(result.num_prompt_tokens for result in results)),
    }
