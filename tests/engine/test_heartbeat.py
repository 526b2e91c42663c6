"""The heartbeat: what counts as progress of a step thread, and what it tells."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine import heartbeat
from engine.heartbeat import Activity, Heartbeat, Phase
from engine.protocol.notify import ALIVE, READY, VARIABLE, notify


class Machine:
    """A clock, and the processor time of a step thread and of the compilers it started."""

    def __init__(self) -> None:
        self.now = self.own = self.children = 0.0

    def pass_(self, seconds: float, *, own: float = 0.0, children: float = 0.0) -> None:
        self.now += seconds
        self.own += own
        self.children += children


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(Activity, "processor_s", lambda _: machine.own)
    monkeypatch.setattr(heartbeat, "_of_children", lambda _: machine.children)
    return machine


def started(machine: Machine, phase: Phase) -> tuple[Activity, Heartbeat]:
    """An activity that has just begun a phase, and a heartbeat that has seen it."""
    activity = Activity()
    beats = Heartbeat(activity, clock=lambda: machine.now)
    activity.begin(phase)
    assert beats.beat() == 0
    return activity, beats


class Passing(Heartbeat):
    """A heartbeat whose thread can be ended: it would watch other tests."""

    def _run(self) -> None:
        with suppress(SystemExit):
            super()._run()


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.name)
def test_a_thread_that_begins_something_gets_on(machine: Machine, phase: Phase) -> None:
    activity, beats = started(machine, phase)
    for _ in range(100):
        machine.pass_(1000.0)
        activity.begin(phase)
        assert beats.beat() == 0


@pytest.mark.parametrize("use", ["own", "children"])
def test_a_long_step_that_computes_gets_on_up_to_a_limit(machine: Machine, use: str) -> None:
    _, beats = started(machine, Phase.COMPUTING)
    for _ in range(600):
        machine.pass_(1.0, **{use: 0.9})
        assert beats.beat() == 0
    machine.pass_(5.0, **{use: 5.0})
    assert beats.beat() == 5.0


def test_a_step_that_uses_no_processor_hangs(machine: Machine) -> None:
    _, beats = started(machine, Phase.COMPUTING)
    machine.pass_(1.0, own=0.01)
    assert beats.beat() == 1.0
    machine.pass_(1.0)
    assert beats.beat() == 2.0
    machine.pass_(1.0, own=0.9)
    assert beats.beat() == 0


def test_waiting_for_the_device_is_no_progress_even_on_a_busy_processor(machine: Machine) -> None:
    activity, beats = started(machine, Phase.WAITING_FOR_DEVICE)
    for second in range(1, 5):
        machine.pass_(1.0, own=1.0)
        assert beats.beat() == second
    activity.begin(Phase.COMPUTING)
    assert beats.beat() == 0


def test_a_model_may_load_for_long_and_wait_for_its_download(machine: Machine) -> None:
    _, beats = started(machine, Phase.LOADING)
    for _ in range(10):
        machine.pass_(600.0)
        assert beats.beat() == 0
        machine.pass_(1000.0, own=1000.0)
        assert beats.beat() == 0
    machine.pass_(601.0)
    assert beats.beat() == 601.0


def test_an_idle_thread_looks_around_all_the_time(machine: Machine) -> None:
    _, beats = started(machine, Phase.WAITING_FOR_REQUESTS)
    machine.pass_(1.0)
    assert beats.beat() == 0
    machine.pass_(0.5)
    assert beats.beat() == 0.5


@pytest.fixture
def watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What this process is watched by."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "notify"))
        yield sock


def test_the_watcher_hears_of_progress_only(machine: Machine, watcher: socket.socket) -> None:
    _, beats = started(machine, Phase.COMPUTING)
    assert watcher.recv(100) == ALIVE
    machine.pass_(3.0)
    beats.beat()
    with pytest.raises(BlockingIOError):
        watcher.recv(100)


def test_listeners_hear_how_long_there_was_no_progress(machine: Machine) -> None:
    heard: list[float] = []
    activity, beats = started(machine, Phase.COMPUTING)
    beats.listeners.append(heard.append)
    machine.pass_(3.0)
    beats.beat()
    activity.begin(Phase.COMPUTING)
    beats.beat()
    assert heard == [3.0, 0.0]


def test_a_hanging_thread_is_reported_once_with_its_place(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    _, beats = started(machine, Phase.WAITING_FOR_DEVICE)
    for _ in range(4):
        machine.pass_(1.0)
        beats.beat()
    (line,) = caplog.messages
    assert line.startswith("no progress for 2 s while waiting for device, in ")
    assert "test_heartbeat.py" in line


def test_nobody_needs_to_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "nobody"), "@no such name"):
        monkeypatch.setenv(VARIABLE, path)
        notify(READY)


def test_a_real_thread_that_computes_gets_on_and_one_that_waits_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the clocks of this machine; the beats are given by hand, so nothing is timed."""
    monkeypatch.setattr(heartbeat, "_of_children", lambda _: 0.0)  # the tests may have some
    activities: list[Activity] = []
    compute, end, ready = threading.Event(), threading.Event(), threading.Event()

    def steps() -> None:
        activities.append(Activity())
        activities[0].begin(Phase.COMPUTING)
        ready.set()
        compute.wait()
        while not end.is_set():
            sum(range(1000))

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    ready.wait()
    now = [0.0]
    beats = Heartbeat(activities[0], clock=lambda: now[0])
    beats.beat()
    now[0] += 10.0  # in which it has used next to nothing
    assert beats.beat() == 10.0
    compute.set()
    used = activities[0].processor_s()
    while activities[0].processor_s() < used + 0.3:  # 2 % of the seconds below
        time.sleep(0)
    now[0] += 2.0
    assert beats.beat() == 0
    end.set()
    thread.join()


def test_beats_go_on_while_the_thread_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_BEAT_S", 0.01)
    beats = Passing(Activity())
    heard = threading.Semaphore(0)
    beats.listeners.append(lambda _: heard.release())
    beats.start()
    assert all(heard.acquire(timeout=10) for _ in range(3))
    beats.listeners.append(lambda _: sys.exit())


def test_a_process_below_that_does_not_work_for_the_thread_is_no_progress() -> None:
    code = "import time\nwhile time.process_time() < 0.1: pass\nprint(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        others = heartbeat._of_children(frozenset({child.pid}))  # which may compute meanwhile
        everything = heartbeat._of_children(frozenset())
        child.communicate(b"\n")
    assert everything > others
