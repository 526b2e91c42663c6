"""Small steps on a GPU, recorded once as CUDA graphs and then replayed.

A model is hundreds of kernels, and launching them takes Python longer than a GPU needs to compute
them for a few tokens. A recorded step is one launch. It always computes the same number of rows, at
the same addresses: a batch is filled up to the next recorded size with padding rows::

    a step of 4 tokens                          [ a9 | b4 | -- | -- ]
    one of 5, where some are draft tokens (?)   [ a9 | b4  b5? b6? ] --
    one with the prompt of c                    [ a9 | b4 | c0 c1 c2 ] -- --

Where there are adapters, each step is recorded twice: without them, so that the rows of others cost
nothing, and with a slot for each row, so that one recording serves any adapters in any mix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..batch.model_input import AdapterRows, AttentionInput, ModelInput
from ..batch.recorded_rows import TableWidths, blank, copy_rows, first_rows
from .shapes import Shape, largest_by_kind

logger = logging.getLogger(__name__)

_PAD_SLOT = -1  # the slot of a padding row: nothing is stored for it
_NO_ADAPTER = -1  # the slot of a row without one
# Failed recordings after which no more are tried: what keeps two steps from being recorded keeps
# all. Too little memory does not count, since smaller steps come later and may fit.
_MOST_FAILURES = 2

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


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded step: the rows that it reads, the logits that it writes, and its replay."""

    rows: ModelInput
    logits: Tensor
    replay: Replay


class _Key(NamedTuple):
    """What a step is recorded for; `adapter_rank` is None without adapters."""

    shape: Shape
    adapter_rank: int | None


class CudaGraphs:
    """Replays small steps; computes all other steps with the model.

    Args:
        forward: computes logits; it must not wait for the device, and must store nothing for
            padding rows, which have a negative slot and belong to a sequence with a context of 0 or
            to no sequence.
        shapes: the steps to record, in this order: the first ones make the memory that the others
            share.
        widths: of the longest sequence's tables.
        vocab_size: columns of the logits.
        device: where inputs and logits are.
        adapter_rank: the largest rank of adapters that steps have room for at present; None if
            steps with adapters are not recorded. Once it changes, those that are recorded are not
            replayed any more.
    """

    def __init__(
        self,
        forward: Callable[[ModelInput], Tensor],
        shapes: Iterable[Shape],
        *,
        widths: TableWidths,
        vocab_size: int,
        device: torch.device,
        adapter_rank: Callable[[], int] | None = None,
    ) -> None:
        self._forward = forward
        self._shapes = [*shapes]
        self._widths = widths
        self._vocab_size = vocab_size
        self._device = device
        self._adapter_rank = adapter_rank
        self._recorded_rank = 0 if adapter_rank is None else adapter_rank()
        self._has_warned = False
        self._recorded: dict[_Key, _Recorded] = {}
        self.num_replays = 0  # steps that were replayed

    @property
    def num_missing(self) -> int:
        """Steps that were to be recorded and are not."""
        return len(self._keys()) - len(self._recorded)

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Records all shapes. A shape that cannot be recorded is computed, and the others replayed.

        A model that cannot be recorded at all, for example since it reads a value from the device,
        is not tried again and again; smaller steps are, where the device has too little memory.
        """
        largest = max((shape.num_rows for shape in self._shapes), default=0)
        logits = torch.empty(largest, self._vocab_size, device=self._device)
        rows = {
            kind: _padding_rows(shape, kind, self._widths, self._device)
            for kind, shape in largest_by_kind(self._shapes).items()
        }
        most_tokens = max((shape.num_tokens for shape in self._shapes), default=0)
        slots = torch.full((most_tokens,), _NO_ADAPTER, device=self._device)
        num_failed = 0
        keys = self._keys()
        for key in tqdm(keys, desc="recording"):
            shape = key.shape
            part = first_rows(rows[shape.kind], *shape, self._widths)
            target = logits[: shape.num_rows]
            if key.adapter_rank is not None:
                part = replace(part, adapters=AdapterRows(None, slots[: shape.num_tokens]))
            try:
                replay = recorder(partial(self._compute, part, target))
            except Exception as error:
                logger.exception("a step of %d tokens cannot be recorded", shape.num_tokens)
                num_failed += not _is_out_of_memory(error)
                if num_failed == _MOST_FAILURES:
                    break
            else:
                self._recorded[key] = _Recorded(part, target, replay)
        if self.num_missing:
            num_recorded = len(self._recorded)
            logger.warning(
                "%d of %d steps are recorded; the others wait for Python", num_recorded, len(keys)
            )

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch; a replay's are valid until the next one."""
        key = self._key_for(batch)
        if key is None:
            return self._forward(batch)
        recorded = self._recorded[key]
        _fill(recorded.rows, batch, key.shape)
        recorded.replay()
        self.num_replays += 1
        return recorded.logits[: len(batch.logits_rows)]

    def _compute(self, rows: ModelInput, logits: Tensor) -> None:
        logits.copy_(self._forward(rows))  # as float32, whatever the model's dtype

    def _keys(self) -> list[_Key]:
        """What is to be recorded, the largest first."""
        ranks = [None] if self._adapter_rank is None else [None, self._recorded_rank]
        return [_Key(shape, rank) for shape, rank in product(self._shapes, ranks)]

    def _key_for(self, batch: ModelInput) -> _Key | None:
        """The smallest recorded step that a batch fits into, if any; none with an image."""
        num_tokens, num_rows = len(batch.input_ids), len(batch.logits_rows)
        num_seqs = len(batch.attention.context_lens)
        if batch.images is not None or not self._widths.fit(batch.attention):
            return None
        rank = None if batch.adapters is None else self._rank_in_force()
        fitting = (
            key
            for key in self._recorded
            if key.adapter_rank == rank
            and num_tokens <= key.shape.num_tokens
            and num_seqs <= key.shape.num_seqs
            and num_rows <= key.shape.num_rows
            and (num_seqs == num_tokens or not key.shape.is_plain)
            and (num_rows == num_tokens or not key.shape.has_all_rows)
        )
        return min(
            fitting, key=lambda it: (it.shape.num_tokens, not it.shape.is_plain), default=None
        )

    def _rank_in_force(self) -> int:
        """The largest rank that a step with adapters has room for; -1 if none is recorded."""
        if self._adapter_rank is None:
            return -1
        rank = self._adapter_rank()
        if self._recorded and rank != self._recorded_rank and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "an adapter of rank %d came, and steps are recorded for %d: those with adapters "
                "wait for Python until the next start",
                rank,
                self._recorded_rank,
            )
        return rank


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is what was missing: ending a recording may fail for that, in other words."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def _padding_rows(
    shape: Shape, kind: tuple[bool, bool], widths: TableWidths, device: torch.device
) -> ModelInput:
    """A batch of padding rows at fixed addresses, for all shapes of a kind up to this one."""
    is_plain, has_all_rows = kind
    rows = blank(shape.num_tokens, shape.num_seqs, shape.num_rows, widths, device)
    _pad_slots(rows.attention, 0)
    if is_plain:
        torch.arange(shape.num_seqs + 1, out=rows.attention.query_start_loc)
    if has_all_rows:
        torch.arange(shape.num_rows, out=rows.logits_rows)
    return rows


def _fill(rows: ModelInput, batch: ModelInput, shape: Shape) -> None:
    """Copies a batch into the first rows; the others become padding rows."""
    copy_rows(rows, batch)
    num_tokens, num_seqs = len(batch.input_ids), len(batch.attention.context_lens)
    rows.input_ids[num_tokens:].fill_(0)
    rows.positions[num_tokens:].fill_(0)
    _pad_slots(rows.attention, num_tokens)
    rows.attention.context_lens[num_seqs:].fill_(0)
    if not shape.is_plain:  # else sequence i has token i, as when it was recorded
        starts = rows.attention.query_start_loc
        starts[: num_seqs + 1].copy_(batch.attention.query_start_loc)
        starts[num_seqs + 1 :].fill_(num_tokens)
    if rows.adapters is not None and batch.adapters is not None:
        rows.adapters.owners[:num_tokens].copy_(batch.adapters.owners)  # of all tokens
        rows.adapters.owners[num_tokens:].fill_(_NO_ADAPTER)
    if not shape.has_all_rows:
        num_rows = len(batch.logits_rows)
        rows.logits_rows[:num_rows].copy_(batch.logits_rows)
        rows.logits_rows[num_rows:].fill_(0)


def _pad_slots(attention: AttentionInput, begin: int) -> None:
    """Makes the tokens from one on such that nothing is stored for them."""
    attention.slot_mapping[begin:].fill_(_PAD_SLOT)
    if attention.window is not None:
        attention.window.slot_mapping[begin:].fill_(_PAD_SLOT)
