"""transformers as a peer: `generate` on a static batch, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.ceilings import synchronise
from benchmarks.load import Item

_PAD = 0
_TIMEOUT_S = 600.0
_PAGE_SIZE = 32  # tokens
_CPU_STEP_TOKENS = 1024


def load_gguf(path: Path) -> Any:
    """The model of a GGUF file, dequantised to float32, whose texts run to their limits."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def generate(model: Any, items: Sequence[Item]) -> tuple[float, list[list[int]]]:
    """Generates a static batch, padded on the left, which runs as long as its longest answer.

    Returns:
        Seconds, and the requested number of tokens of each item.
    """
    ids, mask = _padded(items, model.device)
    longest = max(item.new_tokens for item in items)
    synchronise(model.device)
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=False,
        pad_token_id=_PAD,
    )
    synchronise(model.device)
    seconds = time.perf_counter() - started
    rows = output[:, ids.shape[1] :].tolist()
    return seconds, [row[: item.new_tokens] for row, item in zip(rows, items, strict=True)]


@contextmanager
def continuous(
    model: Any, max_prompt: int, max_new_tokens: int, num_requests: int
) -> Iterator[Any]:
    """A manager of continuous batching, sized for a load and warmed up by transformers.

    On a GPU it chooses its sizes itself; on a CPU it would take all memory and be slow.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=_PAD
    )
    attention = model.config._attn_implementation
    try:
        with model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=_settings(model, max_prompt + max_new_tokens, num_requests),
            block=True,
            timeout=30,
            **_hints(max_prompt, max_new_tokens, num_requests),
        ) as manager:
            yield manager
    finally:
        model.set_attn_implementation(attention)  # the manager has replaced it


def run_continuous(manager: Any, items: Sequence[Item]) -> tuple[float, int]:
    """Runs all items at once; returns seconds and the number of tokens.

    Raises:
        RuntimeError: a request failed, or there were fewer tokens than requested.
    """
    started = time.perf_counter()
    for item in items:
        manager.add_request(item.prompt, max_new_tokens=item.new_tokens, eos_token_id=-1)
    num_tokens, num_open = 0, len(items)
    while num_open:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running() or time.perf_counter() - started > _TIMEOUT_S:
                raise RuntimeError("continuous batching stopped or timed out")
        elif result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            num_open -= 1
            num_tokens += len(result.generated_tokens)
    seconds = time.perf_counter() - started
    if num_tokens != sum(item.new_tokens for item in items):
        raise RuntimeError(f"continuous batching gave {num_tokens} tokens")
    return seconds, num_tokens


def _settings(model: Any, max_tokens: int, num_requests: int) -> Any:
    """Sizes of the cache and of a step on a CPU; None on a GPU, which needs no settings."""
    if model.device.type != "cpu":
        return None
    from transformers import ContinuousBatchingConfig

    pages = -(-max_tokens // _PAGE_SIZE) + 1
    return ContinuousBatchingConfig(
        page_size=_PAGE_SIZE,
        num_blocks=num_requests * pages,
        max_batch_tokens=_CPU_STEP_TOKENS,
    )


def _hints(max_prompt: int, max_new_tokens: int, num_requests: int) -> dict[str, Any]:
    """Arguments that describe the load, for versions of transformers that accept them."""
    try:
        from transformers.generation.continuous_batching.utils import WorkloadHints
    except ImportError:
        return {}
    return {
        "workload_hints": WorkloadHints(
            max_prompt_length=max_prompt,
            max_generated_length=max_new_tokens,
            num_requests=num_requests,
        )
    }


def _padded(items: Sequence[Item], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [rows, longest prompt], padded on the left."""
    longest = max(len(item.prompt) for item in items)
    ids = [[_PAD] * (longest - len(item.prompt)) + item.prompt for item in items]
    mask = [[0] * (longest - len(item.prompt)) + [1] * len(item.prompt) for item in items]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
