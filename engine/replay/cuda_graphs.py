"""Decode steps on a GPU, recorded once as CUDA graphs and then replayed.

A model is hundreds of kernels, and launching them takes Python longer than a GPU needs to compute
them for a few tokens. A recorded step is one launch. It always computes the same number of rows, at
the same addresses: a batch is filled up to the next recorded size with padding rows::

    a step of 4 tokens                          [ a9 | b4 | -- | -- ]
    one of 5, where some are draft tokens (?)   [ a9 | b4  b5? b6? ] --
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..batch import AttentionInput, ModelInput, blank, copy_rows

logger = logging.getLogger(__name__)

_PAD_SLOT = -1  # the slot of a padding row: nothing is stored for it

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], object]], Replay]


def cuda_recorder(device: torch.device) -> Recorder:
    """A recorder of CUDA graphs, which all share their memory, since only one runs at a time.

    They also share one stream, since cuBLAS allocates a workspace for each stream.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(run: Callable[[], object]) -> Replay:
        here = torch.cuda.current_stream(device)
        _warm_up(run, here, side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side):
                run()
        finally:
            torch.cuda.set_stream(here)  # torch stays on the other stream if a recording fails
        return graph.replay

    return record


def _warm_up(run: Callable[[], object], here: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
    """Runs twice what is to be recorded: first calls compile kernels and choose algorithms.

    Raises:
        RuntimeError: it synchronises with the device. While recording, that would be found too
            late: before 2.12, torch's allocator goes on as if that recording had never ended.
    """
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            run()
            with _waiting_forbidden():
                run()
    finally:
        here.wait_stream(side)


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Shape(NamedTuple):
    """Of a recorded step: `num_seqs` is `num_tokens`, or one less in a step with draft tokens."""

    num_tokens: int
    num_seqs: int


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded step: the rows that it reads, the logits that it writes, and its replay."""

    rows: ModelInput
    logits: Tensor
    replay: Replay


class DecodeGraphs:
    """Replays decode steps; computes all other steps with the model.

    Args:
        forward: computes logits; it must not wait for the device, and must store nothing for
            padding rows, which have a negative slot and belong to a sequence with a context of 0 or
            to no sequence.
        sizes: numbers of tokens to record.
        max_blocks: blocks of the longest sequence.
        vocab_size: columns of the logits.
        device: where inputs and logits are.
        with_drafts: whether steps that verify draft tokens are recorded as well.
    """

    def __init__(
        self,
        forward: Callable[[ModelInput], Tensor],
        sizes: Iterable[int],
        *,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
        with_drafts: bool = False,
    ) -> None:
        self._forward = forward
        self._sizes = sorted(set(sizes))
        self._with_drafts = with_drafts
        self._max_blocks = max_blocks
        self._vocab_size = vocab_size
        self._device = device
        self._recorded: dict[_Shape, _Recorded] = {}

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Records all sizes, the largest first, whose memory the others then share.

        A model that cannot be recorded, for example since it reads a value from the device, is
        never replayed.
        """
        largest = self._sizes[-1]
        logits = torch.empty(largest, self._vocab_size, device=self._device)
        decode = _padding_rows(largest, self._max_blocks, self._device)
        torch.arange(largest + 1, out=decode.attention.query_start_loc)
        drafted = _padding_rows(largest, self._max_blocks, self._device)
        try:
            for shape in tqdm(self._shapes(), desc="recording"):
                rows = decode if shape.num_seqs == shape.num_tokens else drafted
                part, target = _first_rows(rows, shape), logits[: shape.num_tokens]
                replay = recorder(partial(self._compute, part, target))
                self._recorded[shape] = _Recorded(part, target, replay)
        except Exception:
            logger.exception("decode steps cannot be recorded; they run unrecorded")
            self._recorded.clear()

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch; a replay's are valid until the next one."""
        recorded = self._recorded_for(batch)
        if recorded is None:
            return self._forward(batch)
        _fill(recorded.rows, batch)
        recorded.replay()
        return recorded.logits[: len(batch.input_ids)]

    def _shapes(self) -> list[_Shape]:
        """What is recorded: all sizes, the largest first, and the same with draft tokens."""
        shapes = [_Shape(size, size) for size in reversed(self._sizes)]
        if self._with_drafts:
            shapes += [_Shape(size, size - 1) for size in reversed(self._sizes) if size > 1]
        return shapes

    def _compute(self, rows: ModelInput, logits: Tensor) -> None:
        logits.copy_(self._forward(rows))  # as float32, whatever the model's dtype

    def _recorded_for(self, batch: ModelInput) -> _Recorded | None:
        """The smallest recorded step that a batch of decoding sequences fits into, if any.

        In such a batch the logits of all tokens are wanted, and no sequence has an adapter.
        """
        num_tokens = len(batch.input_ids)
        num_seqs, num_blocks = batch.attention.block_tables.shape
        index = bisect_left(self._sizes, num_tokens)
        is_too_large = index == len(self._sizes) or num_blocks > self._max_blocks
        is_other = batch.adapters is not None or len(batch.logits_rows) != num_tokens
        if is_too_large or is_other:
            return None
        size = self._sizes[index]
        return self._recorded.get(_Shape(size, size if num_seqs == num_tokens else size - 1))


def _padding_rows(size: int, max_blocks: int, device: torch.device) -> ModelInput:
    """A batch of padding rows at fixed addresses; the logits of all rows are wanted."""
    rows = blank(size, size, size, max_blocks, device)
    rows.attention.slot_mapping.fill_(_PAD_SLOT)
    torch.arange(size, out=rows.logits_rows)
    return rows


def _first_rows(rows: ModelInput, shape: _Shape) -> ModelInput:
    """The first rows of a batch, in the same memory."""
    num_tokens, num_seqs = shape
    attention = rows.attention
    return ModelInput(
        input_ids=rows.input_ids[:num_tokens],
        positions=rows.positions[:num_tokens],
        attention=AttentionInput(
            slot_mapping=attention.slot_mapping[:num_tokens],
            block_tables=attention.block_tables[:num_seqs],
            query_start_loc=attention.query_start_loc[: num_seqs + 1],
            context_lens=attention.context_lens[:num_seqs],
        ),
        logits_rows=rows.logits_rows[:num_tokens],
        sampled={},
        prompt_rows=[],
    )


def _fill(rows: ModelInput, batch: ModelInput) -> None:
    """Copies a batch into the first rows; the others become padding rows."""
    copy_rows(rows, batch)
    num_tokens, num_seqs = len(batch.input_ids), len(batch.attention.context_lens)
    rows.input_ids[num_tokens:].fill_(0)
    rows.positions[num_tokens:].fill_(0)
    rows.attention.slot_mapping[num_tokens:].fill_(_PAD_SLOT)
    rows.attention.context_lens[num_seqs:].fill_(0)
    if num_seqs != num_tokens:  # else sequence i has token i, as when it was recorded
        starts = rows.attention.query_start_loc
        starts[: num_seqs + 1].copy_(batch.attention.query_start_loc)
        starts[num_seqs + 1 :].fill_(num_tokens)
