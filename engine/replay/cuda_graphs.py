"""Decode steps that were recorded once and are replayed.

A model is hundreds of kernels, and starting them takes Python longer than a GPU needs to compute
them for a few tokens. A recorded step starts at one word from the host. It always computes the same
number of rows, at the same addresses: a batch is filled up to the next recorded size with rows that
belong to nobody::

    a step of 4 tokens                      [ a9 | b4 | -- | -- ]
    one of 5, where some may be guesses     [ a9 | b4  b5? b6? ] --
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

_PAD_SLOT = -1  # the slot of a row that belongs to nobody: nothing is stored

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], object]], Replay]


def cuda_recorder(device: torch.device) -> Recorder:
    """Records on a GPU; all recordings share their memory, since only one runs at a time.

    They also share a stream, for each of which cuBLAS has a workspace.
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
            torch.cuda.set_stream(here)  # torch stays on the other one when a recording fails
        return graph.replay

    return record


def _warm_up(run: Callable[[], object], here: torch.cuda.Stream, side: torch.cuda.Stream) -> None:
    """Computes twice what is to be recorded: first calls compile kernels and choose algorithms.

    Raises:
        RuntimeError: it waits for the device. To find that out while recording is too late: before
            2.12, torch's allocator goes on as if that recording had never ended.
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
    """Of a recorded step: as many sequences as tokens, or one less where some may have guesses."""

    num_tokens: int
    num_seqs: int


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded step: where it reads its rows, where it leaves their logits, how to run it."""

    rows: ModelInput
    logits: Tensor
    replay: Replay


class DecodeGraphs:
    """Computes decode steps by replay, and all others as they are.

    Args:
        forward: computes logits; it may not wait for the device, and must store nothing for tokens
            that have a negative slot, whether they belong to a sequence with a context of 0 or to
            none.
        sizes: numbers of tokens to record.
        max_blocks: blocks of the longest sequence.
        vocab_size: columns of the logits.
        device: where everything is.
        with_drafts: whether steps in which guessed tokens are checked are recorded as well.
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

        A model that cannot be recorded, since it asks the device for something on its way, is
        computed as it is from then on.
        """
        largest = self._sizes[-1]
        logits = torch.empty(largest, self._vocab_size, device=self._device)
        decode = _padding_rows(largest, self._max_blocks, self._device)
        torch.arange(largest + 1, out=decode.attention.query_start_loc)
        drafted = _padding_rows(largest, self._max_blocks, self._device)
        shapes = [(_Shape(size, size), decode) for size in reversed(self._sizes)]
        if self._with_drafts:
            sizes = [size for size in reversed(self._sizes) if size > 1]
            shapes += [(_Shape(size, size - 1), drafted) for size in sizes]
        try:
            for shape, rows in tqdm(shapes, desc="recording"):
                part, target = _first_rows(rows, shape), logits[: shape.num_tokens]
                replay = recorder(partial(self._compute, part, target))
                self._recorded[shape] = _Recorded(part, target, replay)
        except Exception:
            logger.exception("decode steps cannot be recorded; they run unrecorded")
            self._recorded.clear()

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch; those of a replay hold until the next."""
        recorded = self._recorded_for(batch)
        if recorded is None:
            return self._forward(batch)
        _fill(recorded.rows, batch)
        recorded.replay()
        return recorded.logits[: len(batch.input_ids)]

    def _compute(self, rows: ModelInput, logits: Tensor) -> None:
        logits.copy_(self._forward(rows))  # as float32, whatever the model gives

    def _recorded_for(self, batch: ModelInput) -> _Recorded | None:
        """The smallest step that a batch fits into, if the logits of all its tokens are wanted."""
        num_tokens = len(batch.input_ids)
        num_seqs, num_blocks = batch.attention.block_tables.shape
        index = bisect_left(self._sizes, num_tokens)
        is_too_large = index == len(self._sizes) or num_blocks > self._max_blocks
        if is_too_large or len(batch.logits_rows) != num_tokens:
            return None
        size = self._sizes[index]
        return self._recorded.get(_Shape(size, size if num_seqs == num_tokens else size - 1))


def _padding_rows(size: int, max_blocks: int, device: torch.device) -> ModelInput:
    """A batch at fixed addresses, in which no token belongs to anybody; all logits are wanted."""
    rows = blank(size, size, size, max_blocks, device)
    rows.attention.slot_mapping.fill_(_PAD_SLOT)
    torch.arange(size, out=rows.logits_rows)
    return rows


def _first_rows(rows: ModelInput, shape: _Shape) -> ModelInput:
    """The same memory, seen as a smaller batch."""
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
    """Copies a batch in; what is left over belongs to nobody."""
    copy_rows(rows, batch)
    num_tokens, num_seqs = len(batch.input_ids), len(batch.attention.context_lens)
    rows.input_ids[num_tokens:].fill_(0)
    rows.positions[num_tokens:].fill_(0)
    rows.attention.slot_mapping[num_tokens:].fill_(_PAD_SLOT)
    rows.attention.context_lens[num_seqs:].fill_(0)
    if num_seqs != num_tokens:  # else sequence i has token i, as it was recorded
        starts = rows.attention.query_start_loc
        starts[: num_seqs + 1].copy_(batch.attention.query_start_loc)
        starts[num_seqs + 1 :].fill_(num_tokens)
