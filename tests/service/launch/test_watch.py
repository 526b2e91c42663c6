"""Signs of life of children, and how long they may be missing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.protocol.notify import ALIVE, READY, notify
from service.launch import watch
from service.launch.watch import Notifications, Probing, until_silent


@pytest.fixture
def notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notifications]:
    """What this process is watched by, as if it were a child."""
    notifications = Notifications(tmp_path / "notify")
    for name, value in notifications.environment.items():
        monkeypatch.setenv(name, value)
    yield notifications
    notifications._socket.close()


class Machine:
    """Time that passes only in the pauses of a watch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.num_looks = 0
        self.pauses: dict[int, float] = {}  # by look: how long this process stands still
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watch.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.num_looks += 1
        self.now += self.pauses.get(self.num_looks, seconds)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


class Scripted:
    """A child that gives signs of life up to a look."""

    def __init__(self, num_signs: int, *, is_ready: bool = True) -> None:
        self.is_ready = is_ready
        self.environment: dict[str, str] = {}
        self._signs = iter([True] * num_signs)

    def begin(self) -> None:
        """Nothing to forget."""

    async def has_sign(self) -> bool:
        return next(self._signs, False)


async def test_signs_are_messages_since_the_last_look(notifications: Notifications) -> None:
    assert not await notifications.has_sign()
    notify(ALIVE)
    notify(ALIVE)
    assert await notifications.has_sign()
    assert not await notifications.has_sign()
    assert not notifications.is_ready
    notify(READY)
    assert await notifications.has_sign()
    assert notifications.is_ready


async def test_a_new_child_starts_anew(notifications: Notifications) -> None:
    notify(READY)
    await notifications.has_sign()
    notify(ALIVE)
    notifications.begin()
    assert not await notifications.has_sign()
    assert not notifications.is_ready


def test_a_watcher_that_does_not_read_holds_up_nobody(notifications: Notifications) -> None:
    for _ in range(10_000):
        notify(ALIVE)


async def test_probes_that_fail_or_hang_are_no_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_PROBE_S", 0.05)

    async def refused() -> bool:
        raise ConnectionRefusedError

    async def hangs() -> bool:
        await asyncio.Event().wait()
        return True

    async def answers() -> bool:
        return True

    assert not await Probing(refused).has_sign()
    assert not await Probing(hangs).has_sign()
    probing = Probing(answers)
    assert not probing.is_ready
    assert await probing.has_sign()
    assert probing.is_ready
    probing.begin()
    assert not probing.is_ready


async def test_silence_counts_from_the_last_sign(machine: Machine) -> None:
    assert await until_silent(Scripted(40), patience=10.0) == 10.0
    assert machine.now == 20.0


async def test_a_child_that_is_not_ready_has_longer(machine: Machine) -> None:
    assert await until_silent(Scripted(0, is_ready=False), patience=10.0) == 60.0
    assert await until_silent(Scripted(0, is_ready=False), patience=90.0) == 90.0


async def test_a_pause_of_the_watcher_itself_is_not_the_childs_silence(machine: Machine) -> None:
    machine.pauses = {3: 3600.0}
    assert await until_silent(Scripted(2), patience=10.0) == 10.0
    assert machine.num_looks == 2 + 1 + 32  # a look after the pause, and eight more seconds


def test_the_socket_is_a_datagram_socket(notifications: Notifications) -> None:
    """As sd_notify(3) has it, so that a child may also be watched by systemd."""
    assert notifications._socket.type == socket.SOCK_DGRAM
