"""A fake model whose logits are a function of the context, and helpers to run an engine with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from threading import Semaphore
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from engine.batch.model_input import ModelInput
from engine.engine import Engine
from engine.executor import Forward, no_replays
from engine.protocol.request import Request, SamplingParams, SequenceOutput
from engine.sampling.watermark import Watermark
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler

VOCAB_SIZE = 32
BLOCK_SIZE = 4
POISON = VOCAB_SIZE - 1  # a context with this token has no valid logits
FATAL = VOCAB_SIZE - 2  # a step with this token raises
CPU = torch.device("cpu")
RUNS_AHEAD = ContextVar("RUNS_AHEAD", default=False)  # of engines made by `make_engine`


@cache
def next_logits(token_ids: tuple[int, ...]) -> Tensor:
    """Float32 [VOCAB_SIZE]: noise that depends on every token of the context."""
    if POISON in token_ids:
        return torch.full((VOCAB_SIZE,), float("nan"))
    generator = torch.Generator().manual_seed(crc32(bytes(token_ids)))
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    logits[[POISON, FATAL]] = float("-inf")
    return logits


@cache
def counting_logits(token_ids: tuple[int, ...]) -> Tensor:
    """Float32 [VOCAB_SIZE]: after each number comes the next one, after nine comes zero."""
    logits = next_logits(token_ids).clone()
    logits[(token_ids[-1] + 1) % 10] = 40.0
    return logits


class FakeModel:
    """Stores token ids in cache slots in place of keys and values, and reads its context from them.

    So a wrong slot, a wrong block table or a block shared by mistake gives other tokens.
    """

    def __init__(
        self,
        num_blocks: int,
        gate: Semaphore | None = None,
        logits_of: Callable[[tuple[int, ...]], Tensor] = next_logits,
    ) -> None:
        self.gate = gate
        self.logits_of = logits_of
        self.slots = torch.full((num_blocks, BLOCK_SIZE), POISON)

    @torch.inference_mode()  # as `ModelRunner.forward`
    def __call__(self, batch: ModelInput) -> Tensor:
        """The logits of the wanted rows, read through the block tables."""
        if self.gate is not None:
            assert self.gate.acquire(timeout=30), "the test allows no more steps"
        if FATAL in batch.input_ids:
            raise RuntimeError("the device is on fire")
        slots = batch.attention.slot_mapping
        self.slots.view(-1)[slots[slots >= 0]] = batch.input_ids[slots >= 0]
        rows: list[Tensor] = []
        starts = batch.attention.query_start_loc.tolist()
        for index, table in enumerate(batch.attention.block_tables.long()):
            context = self.slots[table].flatten().tolist()
            for position in batch.positions[starts[index] : starts[index + 1]].tolist():
                rows.append(self.logits_of(tuple(context[: position + 1])))
        return torch.stack(rows)[batch.logits_rows]


def make_engine(
    *,
    num_blocks: int = 64,
    enable_prefix_caching: bool = True,
    gate: Semaphore | None = None,
    logits_of: Callable[[tuple[int, ...]], Tensor] = next_logits,
    runs_ahead: bool | None = None,
    wrap: Callable[[FakeModel], Forward] = lambda model: model,
    num_replays: Callable[[], int] = no_replays,
    **limits: int,
) -> Engine:
    """An engine over a `FakeModel`; each step takes a permit of `gate`, if there is one.

    `wrap` wraps the model, and `num_replays` counts what that has replayed. By default `RUNS_AHEAD`
    says whether the engine runs ahead. `limits` are those of `Scheduler`.
    """
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching)
    scheduler = Scheduler(blocks, **{"max_step_tokens": 64, "max_num_seqs": 40, **limits})
    watermark = Watermark(VOCAB_SIZE, CPU)
    ahead = RUNS_AHEAD.get() if runs_ahead is None else runs_ahead
    model = FakeModel(num_blocks, gate, logits_of)
    return Engine(
        wrap(model),
        scheduler,
        CPU,
        watermark=watermark,
        runs_ahead=ahead,
        num_replays=num_replays,
    )


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    max_new_tokens: int = 5,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> Request:
    """A request with these parameters."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(**(sampling or {})),
        **options,
    )


def run(
    engine: Engine, *requests: Request, max_steps: int = 2000
) -> dict[str, list[SequenceOutput]]:
    """Adds requests and runs steps until all have ended; returns each request's outputs."""
    outputs: defaultdict[str, list[SequenceOutput]] = defaultdict(list)
    for request in requests:
        refused = engine.add(request)
        if refused is not None:
            outputs[request.request_id].append(refused)
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
        engine.check_integrity()
    raise AssertionError(f"not done after {max_steps} steps")


def token_ids(outputs: list[SequenceOutput]) -> list[int]:
    """The tokens of a request's outputs."""
    return [output.token.token_id for output in outputs if output.token is not None]


def greedy_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The tokens with which `FakeModel` continues a prompt."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(next_logits(tuple(ids)).argmax()))
    return ids[len(prompt) :]
