"""Adapters of a divided model: the first rank decides, and each rank has its part of every update.

Files are read by a thread of each rank while steps go on. What changes what a step computes goes
between two plans, in the same order on all ranks. Reads have numbers, since their threads and the
steps do not wait for each other: an order that comes late is not taken for one of a later read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ..adapters.adapted_layers import AdaptedLayers, FittedAdapter
from ..adapters.bank import AdapterBank
from ..adapters.loader import read_fitted
from ..protocol.adapters import LoadAdapter
from ..protocol.errors import AdapterError, AdapterFault
from .plan_channel import Order, PlanReceiver, PlanSender


class AdapterLeader:
    """The first rank's end; see `OtherRanks`.

    Args:
        sender: tells the other ranks what to do between two steps.
        readers: a connection to the thread of each other rank that reads adapters.
    """

    def __init__(self, sender: PlanSender, readers: Sequence[Connection]) -> None:
        self._sender = sender
        self._readers = readers
        self._numbers = itertools.count()
        self._reads: dict[str, int] = {}  # the number of the last one, by name

    def read(self, wanted: LoadAdapter, directory: Path, digest: str) -> None:
        """See OtherRanks."""
        number = self._reads[wanted.name] = next(self._numbers)
        for reader in self._readers:
            reader.send((number, wanted, directory))
        answers: list[tuple[AdapterFault | None, str]] = [it.recv() for it in self._readers]
        for rank, (fault, text) in enumerate(answers, 1):
            if fault is not None:
                raise AdapterError(fault, f"{text} (rank {rank})")
            if text != digest:
                changed = f"adapter {wanted.name}: its files change while they are read"
                raise AdapterError(AdapterFault.INVALID, changed)

    def discard(self, name: str) -> None:
        """See OtherRanks."""
        number = self._reads.pop(name, None)
        if number is not None:
            self._sender.order("discard", number)

    def adopt(self, name: str, digest: str) -> None:
        """See OtherRanks."""
        self._sender.order("adopt", self._reads.pop(name), digest)
        for rank, answer in enumerate(self._sender.answers(), 1):
            if answer:
                raise MemoryError(f"rank {rank}: {answer}")

    def put(self, slot: int, digest: str | None) -> None:
        """See OtherRanks."""
        self._sender.order("put", slot, digest)

    def drop(self, digest: str) -> None:
        """See OtherRanks."""
        self._sender.order("drop", digest)


class AdapterFollower:
    """Another rank's end.

    Args:
        bank: the adapters of the start, in the slots that they have on all ranks.
        receiver: by which orders are answered.
        reads: asks for adapters to be read.
    """

    def __init__(self, bank: AdapterBank, receiver: PlanReceiver, reads: Connection) -> None:
        self._layers = bank.layers
        self._receiver = receiver
        self._kept = dict(bank.loaded)  # by digest
        self._read: dict[int, FittedAdapter] = {}  # by the number of the read
        arguments = (bank.layers, reads, self._read)
        threading.Thread(target=_read_all, args=arguments, name="adapters", daemon=True).start()

    def obey(self, order: Order) -> None:
        """Does what the first rank says.

        Raises:
            ValueError: it says something that this version does not know.
        """
        match order:
            case Order("discard", (int(number),)):
                self._read.pop(number, None)
            case Order("adopt", (int(number), str(digest))):
                self._receiver.answer(self._adopt(number, digest))
            case Order("put", (int(slot), digest)):
                self._layers.put(slot, None if digest is None else self._kept[str(digest)])
            case Order("drop", (str(digest),)):
                self._kept.pop(digest, None)
            case _:
                raise ValueError(f"no rank knows how to {order.verb}")

    def _adopt(self, number: int, digest: str) -> str:
        """Why an adapter that was read cannot be kept; empty if it is."""
        adapter = self._read.pop(number)
        try:
            self._layers.reserve(adapter)
        except torch.OutOfMemoryError as error:
            return str(error)
        self._kept.setdefault(digest, adapter)
        return ""


def _read_all(layers: AdaptedLayers, reads: Connection, read: dict[int, FittedAdapter]) -> None:
    """Reads adapters until the first rank ends."""
    number: int
    wanted: LoadAdapter
    root: Path
    while True:
        try:
            number, wanted, root = reads.recv()
        except (EOFError, OSError):
            return
        outcome = read_fitted(layers, wanted, root)
        if isinstance(outcome, AdapterError):
            reads.send((outcome.fault, str(outcome)))
        else:
            read[number] = outcome
            reads.send((None, outcome.digest))
