"""What other ranks get of a step: a message, and arrays that lie in memory one after the other.

The message has sizes, which give the shapes of the step's integers, and what only some steps have.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ..batch.integers import Integers, integers_of, model_input, shapes_of
from ..batch.model_input import ImageRows, ModelInput, SequenceState, StateRows

_HEADER = struct.Struct("<9q")

Arrays = list[NDArray[Any]]


class _Sizes(NamedTuple):
    """The sizes that give the shapes of a plan's integers.

    `window` and the width of its block tables are 0 where layers with one have no blocks of their
    own. `num_adapted` tokens have a slot of an adapter; if these are not all, an array says which.
    `num_previous` is 0 unless ids below 0 stand for as many tokens of the step before. `num_states`
    is that of sequences in a decode step of a model with states, and 0 otherwise.
    """

    num_tokens: int
    num_rows: int
    num_seqs: int
    max_blocks: int
    window: int = 0
    window_blocks: int = 0
    num_adapted: int = 0
    num_previous: int = 0
    num_states: int = 0

    @classmethod
    def of(cls, batch: ModelInput) -> Self:
        """Those of a batch."""
        step, window = batch.attention, batch.attention.window
        num_seqs, max_blocks = step.block_tables.shape
        return cls(
            len(batch.input_ids),
            len(batch.logits_rows),
            num_seqs,
            max_blocks,
            *((0, 0) if window is None else (window.window, window.block_tables.shape[1])),
            0 if batch.adapters is None else len(batch.adapters.owners),
            0 if batch.previous is None else len(batch.previous),
            0 if batch.states is None or batch.states.decoding is None else num_seqs,
        )

    @property
    def says_which(self) -> bool:
        """Whether an array says which tokens have a slot of an adapter."""
        return 0 < self.num_adapted < self.num_tokens

    def shapes(self) -> Integers[tuple[int, ...]]:
        """The shapes of the arrays."""
        shapes = shapes_of(
            self.num_tokens,
            self.num_rows,
            self.num_seqs,
            self.max_blocks,
            self.window_blocks if self.window else None,
        )
        adapted = (self.num_adapted,)
        return shapes._replace(
            owners=adapted if self.num_adapted else None,
            adapted=adapted if self.says_which else None,
            states=(self.num_states,) if self.num_states else None,
        )


class _Form(NamedTuple):
    """The shape and the format of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Rest(NamedTuple):
    """What only some steps have: states of other steps than those that decode, and images.

    The latter are the forms of their tensors.
    """

    states: tuple[SequenceState, ...] | None = None
    images: ImageRows[_Form] | None = None


def planned(batch: ModelInput) -> tuple[bytes, Arrays]:
    """The message and the arrays of a batch, which is on the host but for `previous`."""
    arrays: Arrays = [tensor.numpy() for tensor in integers_of(batch).present()]

    def add(tensor: Tensor) -> _Form:
        arrays.append(tensor.contiguous().flatten().view(torch.uint8).numpy())  # of any format
        return _Form(tuple(tensor.shape), tensor.dtype)

    rest = _Rest(
        states=_sequences(batch.states),
        images=None if batch.images is None else batch.images.mapped(add),
    )
    header = _HEADER.pack(*_Sizes.of(batch))
    return header if rest == _Rest() else header + pickle.dumps(rest), arrays


def _sequences(states: StateRows | None) -> tuple[SequenceState, ...] | None:
    return None if states is None or states.decoding is not None else (*states.sequences,)


def write(arrays: Sequence[NDArray[Any]], memory: mmap.mmap) -> None:
    """Writes arrays into memory that is large enough."""
    offset = 0
    for array in arrays:
        np.ndarray(array.shape, array.dtype, memory, offset)[...] = array
        offset += array.nbytes


def read(message: bytes, memory: mmap.mmap) -> ModelInput:
    """The batch of a message and of what was written for it; its tensors are copies.

    Of the `previous` tokens it has the number alone.
    """
    sizes = _Sizes(*_HEADER.unpack(message[: _HEADER.size]))
    reader, shapes = _Reader(memory), sizes.shapes()
    tensors = [
        torch.from_numpy(reader.array(shape, dtype))
        for shape, dtype in zip(shapes.present(), shapes.dtypes(), strict=True)
    ]
    batch = model_input(shapes.replaced(tensors), sizes.window)
    if sizes.num_previous:
        batch = replace(batch, previous=torch.zeros(sizes.num_previous, dtype=torch.int64))
    if len(message) == _HEADER.size:
        return batch
    rest: _Rest = pickle.loads(message[_HEADER.size :])  # noqa: S301 - of our own parent
    if rest.states is not None:
        starts = batch.attention.query_start_loc
        states = StateRows(starts.tolist(), [*rest.states], starts.device)
        batch = replace(batch, states=states)
    if rest.images is not None:
        batch = replace(batch, images=rest.images.mapped(reader.tensor))
    return batch


class _Reader:
    """Copies arrays out of memory, in the order in which they were written."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._offset = 0

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The next array."""
        return self._view(shape, dtype).copy()

    def tensor(self, form: _Form) -> Tensor:
        """The next tensor."""
        tensor = torch.empty(form.shape, dtype=form.dtype)
        tensor.flatten().view(torch.uint8).numpy()[:] = self._view((tensor.nbytes,), np.uint8)
        return tensor

    def _view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        view: NDArray[Any] = np.ndarray(shape, dtype, self._memory, self._offset)
        self._offset += view.nbytes
        return view
