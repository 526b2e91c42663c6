"""Small steps on a CPU, recorded once for each shape and then replayed.

A model is a few hundred operations, and a good part of the time of a small step goes into what
Python does between them: modules, checks, views, conversions. All of that has the same results as
long as the step has the same shape, so a replay leaves it out: `cpu_recorder.py` is to a CPU what a
CUDA graph is to a GPU. No step is padded to a larger shape, since a CPU would compute the padding
rows as well.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.model_input import AdapterRows, ModelInput, StateRows
from ..batch.recorded_rows import TableWidths, blank, copy_rows
from ..block_form import BlockForm
from ..kernels.cpu import CpuKernels
from ..kernels.kernel import listening
from .cpu_recorder import Arena, CpuGraph, CpuGraphRecorder, NotRepeatableError, alias

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 128  # above that, the least recently used one is dropped
# How often a shape must occur before it is recorded, which takes as long as a few steps: while
# there is room, and when another graph has to be dropped. With the lower number alone, too many
# shapes would replace each other all the time.
_MIN_SIGHTINGS = 2
_MIN_SIGHTINGS_WHEN_FULL = 32
_CPU = torch.device("cpu")


class _Shape(NamedTuple):
    num_tokens: int
    num_seqs: int
    num_rows: int
    has_adapters: bool = False
    has_states: bool = False


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    """A graph, the rows that it reads, and the logits that it writes."""

    rows: ModelInput
    logits: Tensor
    graph: CpuGraph


class CpuGraphs:
    """Replays small steps whose shape has been recorded; computes all others with the model.

    Args:
        forward: computes logits, with CPU kernels and operations of torch.
        kernels: those kernels.
        max_tokens: of a step that is recorded; in larger steps Python's time does not matter.
        widths: of the longest sequence's tables.
        clear_state: makes the state in a slot one of no text, for a model that keeps states.
    """

    def __init__(
        self,
        forward: Callable[[ModelInput], Tensor],
        kernels: CpuKernels,
        *,
        max_tokens: int,
        widths: TableWidths,
        clear_state: Callable[[int], None] | None = None,
    ) -> None:
        self._forward = forward
        self._kernels = kernels
        self._max_tokens = max_tokens
        self.num_replays = 0  # steps that were replayed, those of `verify` included
        self._widths = widths
        self._clear_state = clear_state
        self._arena = Arena()
        self._steps: OrderedDict[_Shape, _CapturedStep] = OrderedDict()
        self._sightings: Counter[_Shape] = Counter()

    @property
    def num_graphs(self) -> int:
        """The number of recorded shapes."""
        return len(self._steps)

    @torch.inference_mode()
    def verify(self, last_position: int, block_size: int, form: BlockForm | None = None) -> None:
        """Compares a replay with the model; if their logits differ, no step is ever replayed.

        The graph is recorded with token 0 at position 0, and replayed with token 1 at
        `last_position`. Both steps write into the first block of the cache, which must be unused,
        as must the second if `form` says that layers with a window have blocks of their own.
        """
        first, other = (
            self._one_token(number, position, block_size, form)
            for number, position in ((0, 0), (1, last_position))
        )
        self._record(_shape(first), first)
        self._clear()
        expected = self._forward(other).clone()
        self._clear()
        is_repeatable = torch.equal(self(other), expected)
        self._clear()
        if not is_repeatable:
            logger.warning("small steps are not recorded: the model keeps a state between them")
            self._disable()

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch; a graph's are valid until the next step."""
        shape = _shape(batch)
        is_large = shape.num_tokens > self._max_tokens or not self._widths.fit(batch.attention)
        has_parts = batch.states is not None and batch.states.decoding is None
        if is_large or has_parts or batch.images is not None:
            return self._forward(batch)
        step = self._steps.get(shape)
        if step is None:
            self._sightings[shape] += 1
            is_full = len(self._steps) >= _MAX_GRAPHS
            wanted = _MIN_SIGHTINGS_WHEN_FULL if is_full else _MIN_SIGHTINGS
            if self._sightings[shape] < wanted:
                return self._forward(batch)
            del self._sightings[shape]
            return self._record(shape, batch)
        self._steps.move_to_end(shape)
        _fill(step.rows, batch)
        step.graph.replay()
        self.num_replays += 1
        return step.logits

    def _record(self, shape: _Shape, batch: ModelInput) -> Tensor:
        rows = blank(*shape[:3], self._widths, _CPU)
        if shape.has_adapters:
            owners = torch.full((shape.num_tokens,), -1)
            rows = replace(rows, adapters=AdapterRows(None, owners))
        if shape.has_states:
            rows = replace(
                rows, states=StateRows.decode(torch.zeros(shape.num_seqs, dtype=torch.int64))
            )
        _fill(rows, batch)
        recorder = CpuGraphRecorder(self._arena, self._kernels)
        try:
            with listening(recorder.record_call), recorder:
                logits = self._forward(rows)
        except NotRepeatableError as error:
            logger.warning("small steps are not recorded: %s", error)
            self._disable()
            return self._forward(batch)
        self._steps[shape] = _CapturedStep(rows, alias(logits), recorder.graph())
        if len(self._steps) > _MAX_GRAPHS:
            self._steps.popitem(last=False)
        return logits

    def _clear(self) -> None:
        """Clears the state that one-token steps write."""
        if self._clear_state is not None:
            self._clear_state(0)

    def _one_token(
        self, token_id: int, position: int, block_size: int, form: BlockForm | None
    ) -> ModelInput:
        rows = _one_token(token_id, position, block_size, form, self._widths)
        if self._clear_state is None:
            return rows
        return replace(rows, states=StateRows.decode(torch.zeros(1, dtype=torch.int64)))

    def _disable(self) -> None:
        self._max_tokens = 0
        self._steps.clear()


def _shape(batch: ModelInput) -> _Shape:
    return _Shape(
        len(batch.input_ids),
        len(batch.attention.context_lens),
        len(batch.logits_rows),
        batch.adapters is not None,
        batch.states is not None,
    )


def _one_token(
    token_id: int, position: int, block_size: int, form: BlockForm | None, widths: TableWidths
) -> ModelInput:
    """A step of one token, in a sequence whose blocks are all block 0 of the cache.

    Those of layers with a window are all block 1, if they have their own.
    """
    rows = blank(1, 1, 1, widths, _CPU)
    rows.input_ids.fill_(token_id)
    rows.positions.fill_(position)
    rows.attention.slot_mapping.fill_(position % block_size)
    if form is not None and rows.attention.window is not None:
        rows.attention.slot_mapping.fill_(position % form.whole_size)
        _, slots, tables = rows.attention.window
        slots.fill_(form.window_places * block_size + position % block_size)
        tables.fill_(form.window_places)
    rows.attention.query_start_loc[1] = 1
    rows.attention.context_lens.fill_(position + 1)
    return rows


def _fill(rows: ModelInput, batch: ModelInput) -> None:
    copy_rows(rows, batch)
    rows.attention.query_start_loc.copy_(batch.attention.query_start_loc)
    rows.logits_rows.copy_(batch.logits_rows)
    if batch.adapters is not None and rows.adapters is not None:
        rows.adapters.owners.copy_(batch.adapters.owners)  # of all tokens
    if batch.states is not None and rows.states is not None:
        assert batch.states.decoding is not None
        assert rows.states.decoding is not None
        rows.states.decoding.copy_(batch.states.decoding)
