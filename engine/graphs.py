"""Decode steps that were recorded once and are replayed.

A model is hundreds of kernels, and starting them takes Python longer than a GPU needs to compute
them for a few tokens. A recorded step starts at one word from the host. It always computes the same
number of rows, at the same addresses: a batch is filled up to the next recorded size with rows that
belong to nobody.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from .batch import AttentionInput, ModelInput, blank, copy_rows

logger = logging.getLogger(__name__)

_NUM_WARM_UPS = 2  # before a recording: the first calls compile kernels and choose algorithms
_NOWHERE = -1  # the slot of a row that belongs to nobody: nothing is stored

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], object]], Replay]


def cuda_recorder(device: torch.device) -> Recorder:
    """Records on a GPU; all recordings share their memory, since only one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], object]) -> Replay:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return record


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded step: where it reads its rows, where it leaves their logits, how to run it."""

    rows: ModelInput
    logits: Tensor
    replay: Replay


class DecodeGraphs:
    """Computes decode steps by replay, and all others as they are.

    Args:
        forward: computes logits; it may not wait for the device, and must leave rows alone that
            have a negative slot and a context of 0.
        sizes: numbers of rows to record.
        max_blocks: blocks of the longest sequence.
        vocab_size: columns of the logits.
        device: where everything is.
    """

    def __init__(
        self,
        forward: Callable[[ModelInput], Tensor],
        sizes: Iterable[int],
        *,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sizes = sorted(set(sizes))
        self._max_blocks = max_blocks
        self._vocab_size = vocab_size
        self._device = device
        self._recorded: dict[int, _Recorded] = {}

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Records all sizes, the largest first, whose memory the others then share.

        A model that cannot be recorded, since it asks the device for something on its way, is
        computed as it is from then on.
        """
        rows = _nobodys_rows(self._sizes[-1], self._max_blocks, self._device)
        logits = torch.empty(self._sizes[-1], self._vocab_size, device=self._device)
        try:
            for size in tqdm(reversed(self._sizes), desc="recording", total=len(self._sizes)):
                part, target = _first_rows(rows, size), logits[:size]
                replay = recorder(partial(self._compute, part, target))
                self._recorded[size] = _Recorded(part, target, replay)
        except Exception:
            logger.exception("decode steps cannot be recorded; they run unrecorded")
            self._recorded.clear()
            self._sizes.clear()

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch; those of a replay hold until the next."""
        num_rows = len(batch.input_ids)
        index = bisect_left(self._sizes, num_rows)
        if index == len(self._sizes) or not self._is_decode(batch):
            return self._forward(batch)
        recorded = self._recorded[self._sizes[index]]
        _fill(recorded.rows, batch, num_rows)
        recorded.replay()
        return recorded.logits[:num_rows]

    def _compute(self, rows: ModelInput, logits: Tensor) -> None:
        logits.copy_(self._forward(rows))

    def _is_decode(self, batch: ModelInput) -> bool:
        """Whether every sequence has one token, whose logits are wanted."""
        num_seqs, num_blocks = batch.attention.block_tables.shape
        return (
            len(batch.input_ids) == len(batch.logits_rows) == num_seqs
            and num_blocks <= self._max_blocks
        )


def _nobodys_rows(size: int, max_blocks: int, device: torch.device) -> ModelInput:
    """A decode batch at fixed addresses, in which no row belongs to anybody."""
    rows = blank(size, size, size, max_blocks, device)
    rows.attention.slot_mapping.fill_(_NOWHERE)
    torch.arange(size + 1, out=rows.attention.query_start_loc)
    torch.arange(size, out=rows.logits_rows)
    return rows


def _first_rows(rows: ModelInput, size: int) -> ModelInput:
    """The same memory, seen as a smaller batch."""
    attention = rows.attention
    return ModelInput(
        input_ids=rows.input_ids[:size],
        positions=rows.positions[:size],
        attention=AttentionInput(
            slot_mapping=attention.slot_mapping[:size],
            block_tables=attention.block_tables[:size],
            query_start_loc=attention.query_start_loc[: size + 1],
            context_lens=attention.context_lens[:size],
        ),
        logits_rows=rows.logits_rows[:size],
        sampled={},
        prompt_rows=[],
    )


def _fill(rows: ModelInput, batch: ModelInput, num_rows: int) -> None:
    """Copies a batch in; what is left over belongs to nobody."""
    copy_rows(rows, batch)
    for padded, value in (
        (rows.input_ids, 0),
        (rows.positions, 0),
        (rows.attention.slot_mapping, _NOWHERE),
        (rows.attention.context_lens, 0),
    ):
        padded[num_rows:].fill_(value)
