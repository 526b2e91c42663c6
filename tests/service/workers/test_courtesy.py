"""Threads that compute let the event loop go first."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from service.api.wakeups import GrpcEventLoop
from service.workers import courtesy
from service.workers.courtesy import give_way, giving_way

MOMENT_S = 0.05
DEADLINE_S = 30.0


class Thread:
    """A thread that gives way once."""

    def __init__(self) -> None:
        self.begun, self.done = threading.Event(), threading.Event()

    def run(self) -> None:
        self.begun.set()
        give_way()
        self.done.set()


def test_a_thread_waits_while_the_loop_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courtesy, "_MAX_LOOKS", 10**9)

    async def work() -> None:
        await asyncio.sleep(0.001)  # since the loop's first turn
        thread = Thread()
        running = asyncio.get_running_loop().run_in_executor(None, thread.run)
        assert thread.begun.wait(DEADLINE_S)
        assert not thread.done.wait(MOMENT_S)
        await asyncio.wait_for(running, DEADLINE_S)  # the loop is idle

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(work())


def test_a_loop_that_never_rests_does_not_stop_a_thread() -> None:
    async def work() -> None:
        await asyncio.sleep(0.001)
        thread = Thread()
        running = asyncio.get_running_loop().run_in_executor(None, thread.run)
        assert thread.done.wait(DEADLINE_S)
        await running

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(work())


def test_many_short_parts_do_not_wait_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of which each part takes a tenth of a turn, and a wait nothing."""
    monkeypatch.setattr(courtesy, "_turn", courtesy._Turn())
    monkeypatch.setattr(courtesy._Loop, "is_idle", False)
    monkeypatch.setattr(courtesy._Loop, "thread", 0)
    readings = itertools.count(1)
    monkeypatch.setattr(
        courtesy.time, "perf_counter", lambda: next(readings) * courtesy._TURN_S / 10
    )
    sleeps: list[float] = []
    monkeypatch.setattr(courtesy.time, "sleep", sleeps.append)
    for _ in giving_way(range(1000)):
        pass
    assert 50 <= len(sleeps) / courtesy._MAX_LOOKS <= 110


def test_the_loop_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> list[int]:
        await asyncio.sleep(0.001)
        monkeypatch.setattr(courtesy.time, "sleep", lambda _: pytest.fail("it waits"))
        return list(giving_way(range(100)))

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        assert runner.run(work()) == list(range(100))


def test_a_thread_goes_on_when_the_loop_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(asyncio.sleep(0))
    monkeypatch.setattr(courtesy.time, "sleep", lambda _: pytest.fail("it waits"))
    thread = threading.Thread(target=give_way)
    thread.start()
    thread.join()
    assert courtesy._Loop.is_idle
