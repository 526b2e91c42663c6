"""The integers of a step, in one order: that in which they are copied and lie in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..transfer import upload
from .model_input import AdapterRows, AttentionInput, ModelInput, StateRows, WindowInput

ALIGNMENT = 64  # bytes
NumberArray = NDArray[np.int64] | NDArray[np.int32]
_FORMATS = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}
_NUM_LONGS = 8  # of the fields below

T = TypeVar("T")
U = TypeVar("U")


class Integers(NamedTuple, Generic[T]):
    """Something for each of a step's arrays of integers; None for one that the step does not have.

    First those of int64, then those of int32. What they are, and their shapes, say `ModelInput`,
    `AttentionInput`, `WindowInput`, `AdapterRows`, whose `rows` are `adapted` here, and
    `StateRows`, whose `decoding` are `states`.
    """

    input_ids: T
    positions: T
    slots: T
    logits_rows: T
    window_slots: T | None
    owners: T | None
    adapted: T | None
    states: T | None
    block_tables: T
    starts: T
    contexts: T
    window_tables: T | None

    def present(self) -> list[T]:
        """Those that there are."""
        return [it for it in self if it is not None]

    def replaced(self, others: Iterable[U]) -> Integers[U]:
        """Others in the places of those that there are."""
        left = iter(others)
        return Integers._make(None if it is None else next(left) for it in self)

    def dtypes(self) -> list[type[np.int64] | type[np.int32]]:
        """The types of those that there are."""
        types = [np.int64] * _NUM_LONGS + [np.int32] * (len(self) - _NUM_LONGS)
        return [dtype for dtype, it in zip(types, self, strict=True) if it is not None]


def shapes_of(
    num_tokens: int,
    num_rows: int,
    num_seqs: int,
    max_blocks: int,
    window_blocks: int | None = None,
) -> Integers[tuple[int, ...]]:
    """The shapes of a step's arrays, without adapters and states.

    `window_blocks` is the width of the tables of layers with a window; None if they have no blocks
    of their own.
    """
    tokens = (num_tokens,)
    return Integers(
        input_ids=tokens,
        positions=tokens,
        slots=tokens,
        logits_rows=(num_rows,),
        window_slots=None if window_blocks is None else tokens,
        owners=None,
        adapted=None,
        states=None,
        block_tables=(num_seqs, max_blocks),
        starts=(num_seqs + 1,),
        contexts=(num_seqs,),
        window_tables=None if window_blocks is None else (num_seqs, window_blocks),
    )


def integers_of(batch: ModelInput) -> Integers[Tensor]:
    """Those of a batch."""
    step, window, adapters = batch.attention, batch.attention.window, batch.adapters
    return Integers(
        input_ids=batch.input_ids,
        positions=batch.positions,
        slots=step.slot_mapping,
        logits_rows=batch.logits_rows,
        window_slots=None if window is None else window.slot_mapping,
        owners=None if adapters is None else adapters.owners,
        adapted=None if adapters is None else adapters.rows,
        states=None if batch.states is None else batch.states.decoding,
        block_tables=step.block_tables,
        starts=step.query_start_loc,
        contexts=step.context_lens,
        window_tables=None if window is None else window.block_tables,
    )


def model_input(
    integers: Integers[Tensor], window: int = 0, names: tuple[str, ...] = ()
) -> ModelInput:
    """A batch of these; `window` is the largest one of layers that have blocks of their own.

    `names` are those of its adapters, if their owners are not slots of the device.
    """
    of_window = adapters = None
    if integers.window_slots is not None and integers.window_tables is not None:
        of_window = WindowInput(window, integers.window_slots, integers.window_tables)
    if integers.owners is not None:
        adapters = AdapterRows(integers.adapted, integers.owners, names)
    return ModelInput(
        input_ids=integers.input_ids,
        positions=integers.positions,
        attention=AttentionInput(
            slot_mapping=integers.slots,
            block_tables=integers.block_tables,
            query_start_loc=integers.starts,
            context_lens=integers.contexts,
            window=of_window,
        ),
        logits_rows=integers.logits_rows,
        sampled={},
        prompt_rows=[],
        adapters=adapters,
        states=None if integers.states is None else StateRows.decode(integers.states),
    )


def zeros(shapes: Integers[tuple[int, ...]], device: torch.device) -> Integers[Tensor]:
    """Zeros of these shapes."""
    formats = (_FORMATS[np.dtype(dtype)] for dtype in shapes.dtypes())
    return shapes.replaced(
        torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes.present(), formats, strict=True)
    )


def uploaded(batch: ModelInput, device: torch.device) -> ModelInput:
    """A batch on the host, copied to a device, its integers in one transfer."""
    if device.type == "cpu":
        return batch
    integers, window = integers_of(batch), batch.attention.window
    moved = upload_together([tensor.numpy() for tensor in integers.present()], device)
    copy = model_input(
        integers.replaced(moved),
        0 if window is None else window.window,
        () if batch.adapters is None else batch.adapters.names,
    )
    states = copy.states
    if states is None and batch.states is not None:
        states = batch.states._replace(device=device)
    return replace(
        copy,
        states=states,
        sampled=batch.sampled,
        prompt_rows=batch.prompt_rows,
        images=None if batch.images is None else batch.images.mapped(lambda it: it.to(device)),
        previous=batch.previous,
    )


def upload_together(arrays: Sequence[NumberArray], device: torch.device) -> list[Tensor]:
    """Copies the arrays to the device in one transfer.

    Each starts at a multiple of the longest vector that kernels load: Triton compiles a kernel
    again for pointers that are aligned otherwise.
    """
    sizes = [(values.nbytes // ALIGNMENT + 1) * ALIGNMENT for values in arrays]
    buffer = np.empty(sum(sizes), dtype=np.uint8)
    starts = [*itertools.accumulate(sizes, initial=0)]
    for values, start in zip(arrays, starts, strict=False):
        buffer[start : start + values.nbytes].view(values.dtype)[:] = values.ravel()
    uploaded = upload(buffer, device)
    return [
        uploaded[start : start + values.nbytes].view(_FORMATS[values.dtype]).view(values.shape)
        for values, start in zip(arrays, starts, strict=False)
    ]
