"""How the first rank tells the others what to do: mostly through memory that all of them map.

A step's plan is its arrays (`plan.py`). They are written into the memory one after the other, and
their sizes go through a socket, for which the others wait: that takes some ten microseconds, and
none of them keeps a processor busy. There is one plan at a time: ranks say when they have copied
it, which is long before the next one.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import NamedTuple

from ..batch.model_input import ModelInput
from .plan import planned, read, write

_FIRST_BYTES = 1 << 20
_PLAN, _NEW_MEMORY, _ORDER = b"p", b"m", b"o"  # the first byte of a message


class Order(NamedTuple):
    """What another rank is to do between two steps, with what and for whom."""

    verb: str
    arguments: tuple[str | int | None, ...]


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
        message, arrays = planned(batch)
        self._await_copies()
        write(arrays, self._room(sum(array.nbytes for array in arrays)))
        self._tell(_PLAN + message)
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
        assert self._memory is not None
        batch = read(message[1:], self._memory)
        self.answer("")
        return batch

    def answer(self, text: str) -> None:
        """Answers an order."""
        self._connection.send_bytes(text.encode())
