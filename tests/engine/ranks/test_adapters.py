"""What another rank cannot do for an adapter is an error of whoever asked, and leaves nothing."""

from __future__ import annotations

import os
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.adapters.adapted_layers import FittedAdapter
from engine.adapters.bank import AdapterBank
from engine.adapters.loader import AdapterLoader
from engine.protocol.adapters import LoadAdapter
from engine.protocol.errors import AdapterError, AdapterFault
from engine.ranks.adapters import AdapterFollower, AdapterLeader
from engine.ranks.plan_channel import Order, PlanReceiver, PlanSender

ONE = FittedAdapter("d1", 4, ())


class Layers:
    """Layers without updates, on a device that may be full."""

    num_slots = 2

    def __init__(self) -> None:
        self.is_full = False
        self.slots: dict[int, FittedAdapter | None] = {}

    def reserve(self, adapter: FittedAdapter) -> None:
        if self.is_full:
            raise torch.OutOfMemoryError("nothing is left")

    def put(self, slot: int, adapter: FittedAdapter | None) -> None:
        self.slots[slot] = adapter


class Ranks:
    """Two ranks in one process: the bank of the first, and the other one."""

    def __init__(self) -> None:
        plans, their_plans = Pipe()
        reads, their_reads = Pipe()
        self.own, self.other = Layers(), Layers()
        self.bank = _bank(self.own)
        self.leader = AdapterLeader(PlanSender([(os.getpid(), plans)]), [reads])
        self.bank.lead(self.leader)
        self.receiver = PlanReceiver(their_plans)
        self.follower = AdapterFollower(_bank(self.other), self.receiver, their_reads)
        self.kept = self.follower._kept
        Thread(target=self._obey, daemon=True).start()

    def read(self, name: str, adapter: FittedAdapter) -> None:
        """Makes the other rank have read an adapter."""
        number = self.leader._reads[name] = next(self.leader._numbers)
        self.follower._read[number] = adapter

    def add(self, name: str, adapter: FittedAdapter) -> None:
        """Adds an adapter that both ranks have read."""
        self.read(name, adapter)
        self.bank.add(name, "source", adapter)

    def settle(self) -> None:
        """Waits until the other rank has done everything so far."""
        with pytest.raises(MemoryError, match="nothing is left"):
            was_full, self.other.is_full = self.other.is_full, True
            self.read("last", ONE)
            self.leader.adopt("last", "")
        self.other.is_full = was_full

    def _obey(self) -> None:
        while isinstance(order := self.receiver.receive(60.0), Order):
            self.follower.obey(order)


def _bank(layers: Any) -> AdapterBank:
    return AdapterBank(layers, 4, AdapterLoader(layers, Path()))


def test_a_full_device_of_one_rank_leaves_an_adapter_on_none() -> None:
    for full in ("own", "other"):
        ranks = Ranks()
        getattr(ranks, full).is_full = True
        with pytest.raises(AdapterError, match="too little memory") as caught:
            ranks.add("one", ONE)
        assert caught.value.fault is AdapterFault.TOO_MANY
        ranks.settle()
        assert (ranks.bank.listed(), ranks.kept, ranks.follower._read) == ((), {}, {})
        assert ranks.own.slots == ranks.other.slots == {}


def test_all_ranks_have_an_adapter_in_the_same_slot_and_lose_it_together() -> None:
    ranks = Ranks()
    ranks.add("one", ONE)
    ranks.add("other name", ONE)
    ranks.bank.remove("one")
    ranks.settle()
    assert ranks.own.slots == ranks.other.slots == {0: ONE}
    ranks.bank.remove("other name")
    ranks.settle()
    assert ranks.own.slots == ranks.other.slots == {0: None}
    assert ranks.kept == {}


def test_an_adapter_that_is_refused_after_it_was_read_is_forgotten() -> None:
    ranks = Ranks()
    wanted = LoadAdapter(name="one", source="one", digest="another")
    ranks.bank._coming["one"] = wanted
    ranks.read("one", ONE)
    with pytest.raises(AdapterError, match="not those that were loaded before"):
        ranks.bank.finish(wanted, ONE)
    ranks.settle()
    assert ranks.follower._read == {}


def test_an_adapter_that_is_read_again_is_not_forgotten_with_the_one_before() -> None:
    """The rank may be slow to forget that one: its thread has read the next by then."""
    ranks = Ranks()
    ranks.read("one", ONE)
    late: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PlanSender, "order", lambda _, *order: late.append(order))
        ranks.leader.discard("one")
        ranks.leader.discard("one")  # of which the other rank hears nothing
    ranks.read("one", ONE)
    for order in late:
        ranks.leader._sender.order(*order)
    ranks.bank.add("one", "source", ONE)
    assert ranks.kept == {"d1": ONE}
    assert ranks.follower._read == {}


def test_an_order_that_is_not_known_is_an_error() -> None:
    follower = AdapterFollower(_bank(Layers()), SimpleNamespace(), Pipe()[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rank knows how to dance"):
        follower.obey(Order("dance", ()))
