"""The supervisor with tiny Python scripts in place of engine, service and Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.bundled import PACKAGE
from service.launch import child as child_module
from service.launch import supervisor as supervisor_module
from service.launch import watch as watch_module
from service.launch.child import Child
from service.launch.plan import Plan, Stage
from service.launch.settings import Settings
from service.launch.supervisor import RestartPolicy, Supervisor, SupervisorError
from service.launch.watch import Notifications, Probe

DEADLINE = 20.0  # seconds that anything may take on a busy machine
FAST = RestartPolicy(first_delay=0.01, max_delay=0.02)
SETTINGS = Settings(port=0, grpc_port=0, drain_seconds=DEADLINE)

# Each script has `note`, which appends a line to a journal that all share, and `started`.
_PRELUDE = """
import os, signal, sys, time
def note(text):
    fd = os.open({journal!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, ("{name} " + text + "\\n").encode())
def stop(*_):
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
def started():
    note("started %d" % os.getpid())
"""
# Says that it is ready, and then that it is alive.
BEATING = """
import socket
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def beat(message):
    sock.sendto(message, os.environ["NOTIFY_SOCKET"])
beat(b"READY=1")
started()
while True: beat(b"WATCHDOG=1"); time.sleep(0.05)
"""
# Says that it has started when it is ready for signals. One that came just before `signal.pause`
# would be handled after the next one.
STEADY = "started()\nwhile True: time.sleep(1)"
STUBBORN = "signal.signal(signal.SIGTERM, lambda *_: note('asked'))\n" + STEADY


class Scene:
    """Three fake children, the journal they write, and the private directory they got."""

    def __init__(self, folder: Path) -> None:
        self.journal = folder / "journal"
        self.scripts = {"engine": STEADY, "service": STEADY, "envoy": STEADY}
        self.stages: tuple[Stage, ...] = (Stage("starting", self._have_started),)
        self.watched: list[str] = []
        self.stdout = io.StringIO()
        self.runtime: Path | None = None
        self.mode = 0
        self.watch: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.is_delivered: Probe | None = None

    def plan(self, _settings: Settings, runtime: Path) -> Plan:
        self.runtime = runtime
        self.mode = runtime.stat().st_mode & 0o777
        (runtime / "leftover").touch()
        commands = {name: self._command(name) for name in self.scripts}
        return Plan(
            commands=commands,
            stages=self.stages,
            banner="ready\n",
            watch=self.watch,
            is_delivered=self.is_delivered,
            signs_of_life={
                name: Notifications(runtime / f"{name}.notify") for name in self.watched
            },
        )

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[2]) for line in self.lines() if line.startswith(f"{name} started")]

    def run(
        self,
        during: Callable[[], Awaitable[None]] | None = None,
        *,
        begin: Callable[[], bool] | None = None,
        settings: Settings = SETTINGS,
        policy: RestartPolicy = FAST,
    ) -> int:
        """Runs a supervisor to its end, and `during` at the same time once `begin` is true."""

        async def main() -> int:
            running = asyncio.create_task(Supervisor(settings, plan=self.plan, policy=policy).run())
            if during is not None:
                await until(begin or self.is_ready)
                await during()
            return await asyncio.wait_for(running, DEADLINE)

        with contextlib.redirect_stdout(self.stdout):
            return asyncio.run(main())

    def is_ready(self) -> bool:
        return bool(self.stdout.getvalue())

    def has_started(self, name: str, times: int) -> bool:
        return len(self.pids(name)) >= times

    def are_started(self) -> bool:
        return all(self.has_started(name, 1) for name in self.scripts)

    def _command(self, name: str) -> list[str]:
        prelude = _PRELUDE.format(journal=str(self.journal), name=name)
        return [sys.executable, "-I", "-S", "-c", prelude + self.scripts[name]]

    async def _have_started(self) -> bool:
        return self.are_started()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


async def interrupt() -> None:
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # or it would end the tests
    os.kill(os.getpid(), signal.SIGTERM)


async def kill_and_see_restarted(scene: Scene, times: int) -> None:
    for number in range(1, times + 1):
        os.kill(scene.pids("engine")[-1], signal.SIGKILL)
        await until(partial(scene.has_started, "engine", number + 1))


async def never() -> bool:
    return False


def test_banner_is_printed_when_all_stages_are_reached(scene: Scene) -> None:
    reached: list[str] = []

    def stage(name: str) -> Stage:
        async def reach() -> bool:
            assert not scene.is_ready()
            reached.append(name)
            return scene.are_started() and reached.count(name) > 1

        return Stage(name, reach)

    scene.stages = (stage("model"), stage("gateway"))
    assert scene.run(interrupt) == 0
    assert sorted(reached, reverse=True) == reached
    assert scene.stdout.getvalue() == "ready\n"


def test_what_is_to_be_watched_is_watched_until_the_end(scene: Scene) -> None:
    seen: list[str] = []

    async def watch() -> None:
        seen.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    async def stop() -> None:
        await until(lambda: bool(seen))
        os.kill(os.getpid(), signal.SIGTERM)

    scene.watch = watch
    assert scene.run(stop) == 0
    assert seen == ["begun", "ended"]


def test_sigterm_drains_service_then_envoy_then_engine(scene: Scene) -> None:
    assert scene.run(interrupt) == 0
    assert scene.lines()[-3:] == ["service stopped", "envoy stopped", "engine stopped"]


@pytest.mark.parametrize("is_hopeless", [False, True])
def test_services_are_told_to_end_at_once_where_there_is_no_hope(
    scene: Scene, is_hopeless: bool
) -> None:
    async def kill_engine() -> None:
        os.kill(scene.pids("engine")[-1], signal.SIGKILL)

    scene.scripts["service"] = (
        "signal.signal(signal.SIGINT, lambda *_: note('hurried'))\n"
        "def stop(*_):\n"
        "    time.sleep(0.1)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + STEADY
    )
    if is_hopeless:
        with pytest.raises(SupervisorError, match="giving up after 1 deaths"):
            scene.run(kill_engine, policy=RestartPolicy(max_deaths=1))
    else:
        assert scene.run(interrupt) == 0
    assert ("service hurried" in scene.lines()) == is_hopeless


def test_several_services_drain_at_the_same_time(scene: Scene) -> None:
    """Each waits until the other has been told to end."""
    scene.scripts.pop("service")
    waits = (
        "def stop(*_):\n"
        "    note('asked')\n"
        f"    while open({str(scene.journal)!r}).read().count('asked') < 2: time.sleep(0.01)\n"
        "    note('stopped')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
    )
    for name in ("service-1", "service-2"):
        scene.scripts[name] = waits + STEADY
    assert scene.run(interrupt) == 0
    *services, envoy, engine = scene.lines()[-4:]
    assert sorted(services) == ["service-1 stopped", "service-2 stopped"]
    assert (envoy, engine) == ("envoy stopped", "engine stopped")


def test_one_of_several_services_is_restarted_and_the_others_stay(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("service-1", "service-2"):
        scene.scripts[name] = STEADY

    async def during() -> None:
        os.kill(scene.pids("service-2")[-1], signal.SIGKILL)
        await until(partial(scene.has_started, "service-2", 2))
        await interrupt()

    with caplog.at_level(logging.INFO):
        assert scene.run(during) == 0
    assert len(scene.pids("service-1")) == 1
    restarts = [line for line in caplog.messages if "restarting" in line]
    assert restarts == ["service-2 was killed (out of memory?); restarting it in 0.0 s"]


def test_an_error_of_one_of_several_services_is_named_in_its_own_words(scene: Scene) -> None:
    scene.stages = (Stage("never ready", never),)
    scene.scripts["service-2"] = (
        "print('tokenwire service: cannot listen', file=sys.stderr)\n"
        "print('something else', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    with pytest.raises(SupervisorError) as failure:
        scene.run()
    assert str(failure.value) == "service-2 ended with status 1: cannot listen"


def test_sigterm_while_starting_stops_cleanly_without_a_banner(scene: Scene) -> None:
    scene.stages = (Stage("never ready", never),)
    assert scene.run(interrupt, begin=scene.are_started) == 0
    assert not scene.is_ready()


def test_the_gateway_is_stopped_once_callers_have_all_answers(scene: Scene) -> None:
    asked: list[bool] = []

    async def is_delivered() -> bool:
        asked.append("service stopped" in scene.lines() and "envoy stopped" not in scene.lines())
        return len(asked) == 3

    scene.is_delivered = is_delivered
    assert scene.run(interrupt) == 0
    assert asked == [True] * 3
    assert scene.lines()[-3:] == ["service stopped", "envoy stopped", "engine stopped"]


async def _gone() -> bool:
    raise ConnectionRefusedError


@pytest.mark.parametrize("is_delivered", [never, _gone])
def test_callers_who_never_read_are_not_waited_for_beyond_the_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, is_delivered: Probe
) -> None:
    monkeypatch.setattr(supervisor_module, "_DELIVERY_S", 0.2)
    scene.is_delivered = is_delivered
    assert scene.run(interrupt, settings=Settings(port=0, grpc_port=0, drain_seconds=0.1)) == 0


def test_an_engine_that_dies_while_services_drain_is_restarted(scene: Scene) -> None:
    scene.scripts["service"] = (
        "def stop(*_):\n"
        "    note('asked')\n"
        f"    while open({str(scene.journal)!r}).read().count('engine started') < 2:\n"
        "        time.sleep(0.01)\n"
        "    note('stopped')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + STEADY
    )

    async def during() -> None:
        await interrupt()
        await until(lambda: "service asked" in scene.lines())
        os.kill(scene.pids("engine")[-1], signal.SIGKILL)

    assert scene.run(during) == 0
    assert scene.lines()[-3:] == ["service stopped", "envoy stopped", "engine stopped"]


def test_services_end_their_calls_at_a_second_signal(scene: Scene) -> None:
    scene.scripts["service"] = (
        "signal.signal(signal.SIGTERM, lambda *_: note('asked'))\n"
        "def hurry(*_):\n"
        "    note('hurried')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGINT, hurry)\n" + STEADY
    )

    async def during() -> None:
        await interrupt()
        await until(lambda: "service asked" in scene.lines())
        await interrupt()

    assert scene.run(during) == 1
    assert scene.lines()[-3:] == ["service hurried", "envoy stopped", "engine stopped"]


@pytest.mark.parametrize("num_signals", [2, 3])
def test_what_does_not_end_after_a_second_signal_or_gets_a_third_is_killed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, num_signals: int
) -> None:
    monkeypatch.setattr(supervisor_module, "_HURRY_S", 0.1 if num_signals == 2 else 1e6)
    scene.scripts["service"] = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + STUBBORN

    async def during() -> None:
        await interrupt()
        await until(lambda: "service asked" in scene.lines())
        for _ in range(num_signals - 1):
            await interrupt()
            await asyncio.sleep(0)  # lets the loop see each signal

    assert scene.run(during) == 1
    assert not any(is_alive(pid) for name in scene.scripts for pid in scene.pids(name))


def test_service_that_does_not_drain_in_time_is_killed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_STOP_S", 0.1)
    scene.scripts["service"] = STUBBORN
    assert scene.run(interrupt, settings=Settings(port=0, grpc_port=0, drain_seconds=0.1)) == 0
    assert not is_alive(scene.pids("service")[0])


def test_child_that_fails_at_the_start_is_named_with_its_last_line(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.stages = (Stage("never ready", never),)
    scene.scripts["engine"] = (
        "print('loading', file=sys.stderr)\n"
        "print('tokenwire engine: cannot load /x: no such model', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    with pytest.raises(SupervisorError) as failure:
        scene.run()
    assert str(failure.value) == "engine ended with status 1: cannot load /x: no such model"
    assert "loading\n" in capsys.readouterr().err
    assert not any(is_alive(pid) for name in scene.scripts for pid in scene.pids(name))


def test_child_killed_at_the_start_may_lack_memory(scene: Scene) -> None:
    scene.stages = (Stage("never ready", never),)
    scene.scripts["engine"] = (
        "print('half loaded', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(SupervisorError) as failure:
        scene.run()
    assert str(failure.value) == "engine was killed (out of memory?)"


def test_command_that_does_not_exist_stops_the_others(scene: Scene) -> None:
    def plan(settings: Settings, runtime: Path) -> Plan:
        whole = scene.plan(settings, runtime)
        commands = {**whole.commands, "envoy": ["/no/such/binary"]}
        return Plan(commands=commands, stages=whole.stages, banner="")

    with pytest.raises(FileNotFoundError):
        asyncio.run(Supervisor(SETTINGS, plan=plan).run())
    assert not any(is_alive(pid) for name in scene.scripts for pid in scene.pids(name))


def test_dead_child_is_restarted_and_the_others_stay(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    async def during() -> None:
        await kill_and_see_restarted(scene, times=2)
        await interrupt()

    with caplog.at_level(logging.INFO):
        assert scene.run(during) == 0
    assert len(scene.pids("service")) == len(scene.pids("envoy")) == 1
    restarts = [line for line in caplog.messages if "restarting" in line]
    assert restarts == [
        "engine was killed (out of memory?); restarting it in 0.0 s",
        "engine was killed (out of memory?); restarting it in 0.0 s",
    ]


@pytest.mark.parametrize(("num_failures", "is_hopeless"), [(2, False), (4, True)])
def test_a_machine_that_cannot_start_a_process_just_now_is_asked_again(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_failures: int,
    is_hopeless: bool,
) -> None:
    """It counts as a death, of which five in a row end the server."""
    start, failures = Child.start, [BlockingIOError(errno.EAGAIN, "no process")] * num_failures

    async def start_or_fail(child: Child) -> None:
        if scene.is_ready() and failures:
            raise failures.pop()
        await start(child)

    async def during() -> None:
        monkeypatch.setattr(Child, "start", start_or_fail)
        os.kill(scene.pids("engine")[-1], signal.SIGKILL)
        if not is_hopeless:
            await until(partial(scene.has_started, "engine", 2))
            await interrupt()

    if is_hopeless:
        with pytest.raises(SupervisorError, match="after 5 deaths: engine cannot"):
            scene.run(during)
    else:
        assert scene.run(during) == 0
        assert len(scene.pids("service")) == len(scene.pids("envoy")) == 1
    died, *others = (line for line in caplog.messages if "restarting" in line)
    assert died == "engine was killed (out of memory?); restarting it in 0.0 s"
    assert set(others) == {
        "engine cannot be started: [Errno 11] no process; restarting it in 0.0 s"
    }
    assert len(others) == (3 if is_hopeless else 2)


def test_frozen_child_is_killed_and_restarted_and_the_others_stay(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.scripts["engine"] = BEATING
    scene.watched = ["engine"]

    async def during() -> None:
        pid = scene.pids("engine")[0]
        os.kill(pid, signal.SIGSTOP)
        await until(partial(scene.has_started, "engine", 2))
        assert not is_alive(pid)
        await interrupt()

    settings = Settings(port=0, grpc_port=0, drain_seconds=DEADLINE, engine_stall_seconds=1.0)
    with caplog.at_level(logging.ERROR):
        assert scene.run(during, settings=settings) == 0
    assert "engine was killed: no sign of life for 1 s; restarting it in 0.0 s" in caplog.messages
    assert len(scene.pids("service")) == len(scene.pids("envoy")) == 1


def test_child_that_freezes_while_it_starts_ends_the_start(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_MIN_START_S", 0.5)
    scene.stages = (Stage("never ready", never),)
    scene.watched = ["service"]  # which says nothing
    with pytest.raises(SupervisorError, match=r"^service was killed: no sign of life for 1 s$"):
        scene.run(settings=Settings(port=0, grpc_port=0, engine_stall_seconds=1.0))
    assert not any(is_alive(pid) for name in scene.scripts for pid in scene.pids(name))


def test_own_watcher_of_the_supervisor_is_not_told_of_its_children(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/of/systemd")
    scene.watched = ["engine"]
    for name in scene.scripts:
        scene.scripts[name] = "note('tells %s' % os.environ.get('NOTIFY_SOCKET'))\n" + STEADY

    async def during() -> None:
        await until(lambda: sum("tells" in line for line in scene.lines()) == 3)
        await interrupt()

    assert scene.run(during) == 0
    told = {line.split()[0]: line.split()[-1] for line in scene.lines() if "tells" in line}
    path = str(scene.runtime / "engine.notify") if scene.runtime else ""
    assert told == {"engine": path, "service": "None", "envoy": "None"}


def test_hangup_changes_nothing(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def during() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: any("SIGHUP is ignored" in line for line in caplog.messages))
        await interrupt()

    with caplog.at_level(logging.WARNING):
        assert scene.run(during) == 0
    assert all(len(scene.pids(name)) == 1 for name in scene.scripts)


def test_last_words_are_the_error_of_our_own_command_and_not_what_came_after_it(
    scene: Scene,
) -> None:
    scene.stages = (Stage("never ready", never),)
    scene.scripts["engine"] = (
        "print('tokenwire engine: the disk is full', file=sys.stderr)\n"
        "print('a library says goodbye', file=sys.stderr)\n"
        "sys.exit(1)"
    )
    with pytest.raises(SupervisorError, match=r"^engine ended with status 1: the disk is full$"):
        scene.run()


@pytest.mark.parametrize(
    ("line", "reason"),
    [("GET /health OK", ""), ("tokenwire engine: the disk is full", ": the disk is full")],
    ids=["of something else", "the error of our own command"],
)
def test_of_lines_from_long_before_the_end_only_an_error_is_the_reason(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    monkeypatch.setattr(child_module, "_LAST_WORDS_S", -DEADLINE)
    scene.stages = (Stage("never ready", never),)
    scene.scripts["engine"] = f"print({line!r}, file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(SupervisorError, match=rf"^engine ended with status 3{reason}$"):
        scene.run()


def test_processes_left_by_a_dead_child_are_killed_before_the_restart(scene: Scene) -> None:
    scene.scripts["engine"] = (
        "started()\nworker = os.fork()\nif worker: note('forked %d' % worker)\n"
        "while True: time.sleep(1)"
    )

    def workers() -> list[int]:
        return [int(line.split()[2]) for line in scene.lines() if "forked" in line]

    async def during() -> None:
        await until(lambda: bool(workers()))
        os.kill(scene.pids("engine")[0], signal.SIGKILL)
        await until(lambda: len(workers()) > 1)
        await until(lambda: not is_alive(workers()[0]))
        await interrupt()

    assert scene.run(during) == 0


def test_child_that_keeps_dying_ends_the_server(scene: Scene, tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def during() -> None:
        go.touch()

    scene.scripts["envoy"] = (
        f"started()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "print('cannot bind', file=sys.stderr)\n"
        "sys.exit(3)"
    )
    with pytest.raises(SupervisorError) as failure:
        scene.run(during)
    assert str(failure.value) == "giving up after 5 deaths: envoy ended with status 3: cannot bind"
    assert len(scene.pids("envoy")) == 5
    assert not any(is_alive(pid) for name in scene.scripts for pid in scene.pids(name))


def test_restarts_wait_longer_each_time_up_to_a_limit() -> None:
    delays = [RestartPolicy().delay(number) for number in (1, 2, 3, 4, 5, 6, 7, 10_000)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_only_deaths_close_together_end_the_restarts() -> None:
    policy = RestartPolicy(max_deaths=3, window=60)
    assert not policy.is_hopeless([0, 1])
    assert policy.is_hopeless([0, 1, 60])
    assert not policy.is_hopeless([0, 1, 61])
    assert policy.is_hopeless([0, 100, 101, 102])


def test_long_life_resets_the_count_of_deaths(scene: Scene) -> None:
    policy = RestartPolicy(first_delay=0.001, healthy_after=0.0, max_deaths=2)

    async def during() -> None:
        await kill_and_see_restarted(scene, times=4)
        await interrupt()

    assert scene.run(during, policy=policy) == 0


def test_port_in_use_is_reported_before_anything_starts(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings in (Settings(port=port, grpc_port=0), Settings(port=0, grpc_port=port)):
            with pytest.raises(OSError, match=f"^port {port} on 127.0.0.1 is in use$"):
                asyncio.run(Supervisor(settings, plan=scene.plan).run())
    assert scene.runtime is None


def test_runtime_directory_is_private_and_removed(scene: Scene) -> None:
    assert scene.run(interrupt) == 0
    assert scene.runtime is not None
    assert scene.mode == 0o700
    assert not scene.runtime.exists()


def test_children_do_not_see_the_terminal_nor_variables_that_are_settings(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_TOTAL_TOKENS", "77")
    scene.scripts["engine"] = (
        "note('own session %s' % (os.getsid(0) == os.getpid()))\n"
        "note('variable %s' % os.environ.get('MAX_TOTAL_TOKENS'))\n" + STEADY
    )

    async def during() -> None:
        await until(lambda: any("variable" in line for line in scene.lines()))
        await interrupt()

    assert scene.run(during) == 0
    assert "engine own session True" in scene.lines()
    assert "engine variable None" in scene.lines()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_children_die_with_a_supervisor_that_is_killed(scene: Scene, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import asyncio, json, sys\n"
        "from service.launch.settings import Settings\n"
        "from service.launch.plan import Plan\nfrom service.launch.supervisor import Supervisor\n"
        "commands = json.loads(sys.argv[1])\n"
        "plan = lambda *_: Plan(commands=commands, stages=(), banner='ready\\n')\n"
        "asyncio.run(Supervisor(Settings(port=0, grpc_port=0), plan=plan).run())\n"
    )
    commands = scene.plan(SETTINGS, tmp_path).commands
    root = str(PACKAGE.parent)
    with subprocess.Popen(
        [sys.executable, str(driver), json.dumps(dict(commands))],
        env=os.environ | {"PYTHONPATH": root, "TMPDIR": str(tmp_path)},
    ) as driver_process:
        try:
            asyncio.run(until(lambda: all(scene.pids(name) for name in scene.scripts)))
        finally:
            driver_process.kill()
    pids = [pid for name in scene.scripts for pid in scene.pids(name)]
    asyncio.run(until(lambda: not any(is_alive(pid) for pid in pids)))
    assert not any("stopped" in line for line in scene.lines())


def test_output_of_a_child_is_passed_on_in_whole_lines(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.stages = (Stage("never ready", never),)
    scene.scripts["engine"] = (
        "sys.stderr.buffer.write(b'x' * 200_000 + b'\\n10%\\r20%\\r')\n"
        "sys.stderr.buffer.write('träge\\n\\nno end'.encode())\n"
        "sys.exit(7)"
    )
    with pytest.raises(SupervisorError, match="engine ended with status 7: no end"):
        scene.run()
    assert capsys.readouterr().err.endswith("x\n10%\r20%\rträge\n\nno end")


def test_what_a_process_says_that_a_dead_child_left_is_passed_on_after_the_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It has a session of its own, so that it is not killed with the child."""
    said, gate = tmp_path / "said", tmp_path / "gate"
    os.mkfifo(gate)
    left = f"open({str(gate)!r}).read(); print('late words', file=__import__('sys').stderr)"
    script = (
        "import os, subprocess, sys\n"
        f"if not os.path.exists({str(said)!r}):\n"
        f"    open({str(said)!r}, 'w').close()\n"
        f"    subprocess.Popen([sys.executable, '-c', {left!r}], start_new_session=True)\n"
    )

    async def run() -> None:
        child = child_module.Child("service", [sys.executable, "-c", script], os.environ)
        for _ in range(2):
            await child.start()
            await child.wait()
        gc.collect()
        gate.write_text("go on")
        await until(lambda: "late words\n" in capsys.readouterr().err)

    asyncio.run(run())
    assert not caplog.messages, "no task was lost"


def test_stages_are_logged_when_they_begin_and_end_and_when_they_take_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_LOG_AGAIN_S", 0)
    answers = iter([False, False, True])

    async def reached() -> bool:
        return next(answers)

    with caplog.at_level(logging.INFO):
        asyncio.run(supervisor_module._reach((Stage("loading m", reached),)))
    first, *others, last = caplog.messages
    assert first == "loading m ..."
    assert re.fullmatch(r"loading m took \d+\.\d s", last)
    assert len(others) == 2
    assert all(re.fullmatch(r"loading m \.\.\. \(\d+ s\)", text) for text in others)


def test_one_of_several_engines_that_always_dies_does_not_end_the_server(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.scripts = {"engine-1": STEADY, "engine-2": STEADY, "service": STEADY, "envoy": STEADY}
    policy = RestartPolicy(first_delay=0.001, max_deaths=2, window=600)

    async def during() -> None:
        for times in (1, 2):
            await until(partial(scene.has_started, "engine-2", times))
            os.kill(scene.pids("engine-2")[-1], signal.SIGKILL)
        await until(lambda: any("restarting it in 600.0 s" in line for line in caplog.messages))
        assert is_alive(scene.pids("engine-1")[0])
        await interrupt()

    with caplog.at_level(logging.ERROR):
        assert scene.run(during, policy=policy) == 0
    assert len(scene.pids("engine-2")) == 2


def test_engines_that_all_die_too_often_end_the_server(scene: Scene) -> None:
    scene.scripts = {"engine-1": STEADY, "engine-2": STEADY, "service": STEADY, "envoy": STEADY}
    policy = RestartPolicy(first_delay=0.001, max_deaths=2, window=600)

    async def during() -> None:
        for name in ("engine-1", "engine-2"):
            for times in (1, 2):
                await until(partial(scene.has_started, name, times))
                os.kill(scene.pids(name)[-1], signal.SIGKILL)

    with pytest.raises(SupervisorError, match=r"^giving up after 2 deaths: engine-2 was killed"):
        scene.run(during, policy=policy)


def test_a_child_runs_on_the_processors_that_it_is_given(tmp_path: Path) -> None:
    one = min(os.sched_getaffinity(0))
    told = tmp_path / "told"
    script = f"import os; open({str(told)!r}, 'w').write(str(os.sched_getaffinity(0)))"

    async def run() -> None:
        child = child_module.Child(
            "engine-1", [sys.executable, "-c", script], os.environ, frozenset({one})
        )
        await child.start()
        await child.wait()

    asyncio.run(run())
    assert told.read_text() == str({one})
