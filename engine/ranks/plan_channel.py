"""How the first rank tells the others what to do: mostly through memory that all of them map.

A step's plan is its packed arrays. They are written into the memory one after the other, and their
sizes go through a socket, for which the others wait: that takes some ten microseconds, and none of
them keeps a processor busy. There is one plan at a time: ranks say when they have copied it, which
is long before the next one.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..batch import AdapterRows, AttentionInput, ModelInput, WindowInput

_FIRST_BYTES = 1 << 20
_HEADER = struct.Struct("<8q")
_PLAN, _NEW_MEMORY, _ORDER = b"p", b"m", b"o"  # the first byte of a message


class Order(NamedTuple):
    """What another rank is to do between two steps, with what and for whom."""

    verb: str
    arguments: tuple[str | int | None, ...]


class _Sizes(NamedTuple):
    """The sizes that give the shapes of a plan's arrays.

    `window` and the width of its block tables are 0 where layers with one have no blocks of their
    own. `num_adapted` tokens have a slot of an adapter; if these are not all, an array says which.
    `num_previous` is 0 unless ids below 0 stand for as many tokens of the step before.
    """

    num_tokens: int
    num_rows: int
    num_seqs: int
    max_blocks: int
    window: int = 0
    window_blocks: int = 0
    num_adapted: int = 0
    num_previous: int = 0

    @property
    def says_which(self) -> bool:
        """Whether an array says which tokens have a slot of an adapter."""
        return 0 < self.num_adapted < self.num_tokens

    def views(self, memory: mmap.mmap) -> list[NDArray[np.int64] | NDArray[np.int32]]:
        """The arrays in the memory: those of int64, then those of int32."""
        longs = [(self.num_tokens,)] * 3 + [(self.num_rows,)]
        ints = [(self.num_seqs, self.max_blocks), (self.num_seqs + 1,), (self.num_seqs,)]
        if self.window:
            longs.append((self.num_tokens,))
            ints.append((self.num_seqs, self.window_blocks))
        if self.num_adapted:
            longs += [(self.num_adapted,)] * (1 + self.says_which)
        views: list[NDArray[np.int64] | NDArray[np.int32]] = []
        offset = 0
        for shape, dtype in [(s, np.int64) for s in longs] + [(s, np.int32) for s in ints]:
            views.append(np.ndarray(shape, dtype, memory, offset))
            offset += views[-1].nbytes
        return views

    @property
    def num_bytes(self) -> int:
        """What all arrays take."""
        longs = 3 * self.num_tokens + self.num_rows + (self.num_tokens if self.window else 0)
        longs += self.num_adapted * (1 + self.says_which)
        width = self.max_blocks + self.window_blocks
        return 8 * longs + 4 * (self.num_seqs * (width + 2) + 1)


class PlanSender:
    """The first rank's end.

    Args:
        others: a connection to each other rank, by its process id.
    """

    def __init__(self, others: Sequence[tuple[int, Connection]]) -> None:
        self._others = others
        self._memory: mmap.mmap | None = None
        self._is_being_copied = False

    def send(self, batch: ModelInput) -> None:
        """Tells all ranks to compute a batch, which is on the host but for `previous`.

        Raises:
            OSError: a rank has ended.
        """
        step, window = batch.attention, batch.attention.window
        longs = [batch.input_ids, batch.positions, step.slot_mapping, batch.logits_rows]
        ints = [step.block_tables, step.query_start_loc, step.context_lens]
        of_window = (0, 0)
        if window is not None:
            of_window = (window.window, window.block_tables.shape[1])
            longs.append(window.slot_mapping)
            ints.append(window.block_tables)
        num_adapted = 0
        if batch.adapters is not None:
            num_adapted = len(batch.adapters.owners)
            longs += [it for it in (batch.adapters.owners, batch.adapters.rows) if it is not None]
        arrays = [tensor.numpy() for tensor in (*longs, *ints)]
        num_seqs, max_blocks = step.block_tables.shape
        sizes = _Sizes(
            len(batch.input_ids),
            len(batch.logits_rows),
            num_seqs,
            max_blocks,
            *of_window,
            num_adapted,
            0 if batch.previous is None else len(batch.previous),
        )
        self._await_copies()
        for view, array in zip(sizes.views(self._room(sizes.num_bytes)), arrays, strict=True):
            view[...] = array
        self._tell(_PLAN + _HEADER.pack(*sizes))
        self._is_being_copied = True

    def order(self, verb: str, *arguments: str | int | None) -> None:
        """Tells all ranks to do something before the next batch."""
        self._tell(_ORDER + pickle.dumps(Order(verb, arguments)))

    def answers(self) -> list[str]:
        """Waits for what each rank says of an order that is answered.

        Raises:
            EOFError: a rank has ended.
        """
        self._await_copies()
        return self._received()

    def _await_copies(self) -> None:
        """Waits until all ranks have copied the last batch out of the memory."""
        if self._is_being_copied:
            self._is_being_copied = False
            self._received()

    def _received(self) -> list[str]:
        return [connection.recv_bytes().decode() for _, connection in self._others]

    def _tell(self, message: bytes) -> None:
        for _, connection in self._others:
            connection.send_bytes(message)

    def _room(self, num_bytes: int) -> mmap.mmap:
        """Memory of at least this size, which all ranks know."""
        if self._memory is not None and len(self._memory) >= num_bytes:
            return self._memory
        size = max(_FIRST_BYTES, 2 * num_bytes)
        handle = os.memfd_create("tokenwire plans")  # it has no name that a crash could leave
        try:
            os.ftruncate(handle, size)
            self._memory = mmap.mmap(handle, size)
            for process_id, connection in self._others:
                connection.send_bytes(_NEW_MEMORY)
                send_handle(connection, handle, process_id)
        finally:
            os.close(handle)
        return self._memory


class PlanReceiver:
    """Another rank's end.

    Args:
        connection: to the first rank.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._memory: mmap.mmap | None = None

    def receive(self, timeout: float) -> ModelInput | Order | None:
        """The next batch, on the host, or order; None if there is none for `timeout` seconds.

        Raises:
            EOFError: the first rank has ended.
        """
        if not self._connection.poll(timeout):
            return None
        message = self._connection.recv_bytes()
        while message == _NEW_MEMORY:
            handle = recv_handle(self._connection)
            self._memory = mmap.mmap(handle, 0)
            os.close(handle)
            message = self._connection.recv_bytes()
        if message[:1] == _ORDER:
            order: Order = pickle.loads(message[1:])  # noqa: S301 - of our own parent
            return order
        batch = self._batch(_Sizes(*_HEADER.unpack(message[1:])))
        self.answer("")
        return batch

    def answer(self, text: str) -> None:
        """Answers an order."""
        self._connection.send_bytes(text.encode())

    def _batch(self, sizes: _Sizes) -> ModelInput:
        assert self._memory is not None
        tensors = [torch.from_numpy(view.copy()) for view in sizes.views(self._memory)]
        longs, ints = tensors[: -3 - bool(sizes.window)], tensors[-3 - bool(sizes.window) :]
        ids, positions, slots, rows, *rest = longs
        tables, starts, contexts, *of_window = ints
        window = WindowInput(sizes.window, rest.pop(0), *of_window) if sizes.window else None
        return ModelInput(
            input_ids=ids,
            positions=positions,
            attention=AttentionInput(
                slot_mapping=slots,
                block_tables=tables,
                query_start_loc=starts,
                context_lens=contexts,
                window=window,
            ),
            logits_rows=rows,
            sampled={},
            prompt_rows=[],
            adapters=AdapterRows(rest[1] if sizes.says_which else None, rest[0]) if rest else None,
            previous=torch.zeros(sizes.num_previous, dtype=torch.int64)
            if sizes.num_previous
            else None,
        )
