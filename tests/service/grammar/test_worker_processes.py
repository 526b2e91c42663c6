"""The worker processes: their limits and their replacement; none may be left running."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from engine.grammar.backend_llguidance import regex_source
from service.errors import ErrorKind
from service.grammar import checker as module
from service.grammar.checker import GrammarChecker
from service.workers import process as worker_process
from service.workers.template import ForkedProcess, Template
from tests.service.fakes import TIMEOUT_S, eventually
from tests.service.grammar.checking import (
    ENDLESS,
    checking,
    reason,
    refusal,
    regex,
    schema,
    templates,
    workers,
)
from tests.service.ready_process import ready_process

LATE = "it takes more than 0.5 s to compile"
DIED = "it needs too much memory or time to compile"


async def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_MIN_SHARE", 0)  # this machine may be busy
    async with checking() as checker:
        await checker.check(regex("a"))  # starts the process, which is not the grammar's time
        (before,) = workers()
        checker._deadline_s = 0.5
        assert await reason(checker, schema(ENDLESS)) == LATE
        await eventually(lambda: not before.is_running())
        checker._deadline_s = TIMEOUT_S
        assert await checker.check(regex("b")) == regex_source("b")
        (after,) = workers()
        assert after != before


async def test_a_process_without_processor_time_is_reported_as_overload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "_MIN_SHARE", 10_000)  # of a processor: cannot be reached
    async with checking() as checker:
        await checker.check(regex("a"))
        checker._deadline_s = 0.5
        error = await refusal(checker, schema(ENDLESS))
        assert (error.kind, error.message) == (ErrorKind.OVERLOADED, "Model is overloaded")
        await eventually(lambda: workers() == [])


async def test_a_slow_grammar_does_not_delay_other_grammars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SOON_S", 0.05)
    monkeypatch.setattr(module, "_MAX_SLOW", 1)
    async with checking(num_workers=1) as checker:
        slow = asyncio.create_task(checker.check(schema(ENDLESS)))
        await eventually(lambda: checker._num_slow == 1)
        monkeypatch.setattr(module, "_SOON_S", TIMEOUT_S)
        assert await checker.check(regex("b")) == regex_source("b")
        assert not slow.done()
        monkeypatch.setattr(module, "_SOON_S", 0.05)
        error = await refusal(checker, schema({**ENDLESS, "title": "another"}))
        assert (error.kind, error.message) == (ErrorKind.OVERLOADED, "Model is overloaded")
        assert not slow.done(), "the first one continues"
        slow.cancel()
        await eventually(lambda: checker._num_slow == 0)
        monkeypatch.setattr(module, "_SOON_S", TIMEOUT_S)
        assert await checker.check(regex("c")) == regex_source("c")
        await eventually(lambda: len(workers()) == 1)


async def test_worker_processes_have_the_lowest_priority() -> None:
    async with checking() as checker:
        await checker.check(regex("a"))
        (worker,) = workers()
        assert os.sched_getscheduler(worker.pid) == os.SCHED_IDLE
        assert os.getsid(worker.pid) not in (worker.pid, os.getsid(0))


async def test_the_start_of_a_process_does_not_count_as_the_grammars_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork = Template.fork

    async def slow_fork(self: Template) -> ForkedProcess:
        clock = lambda: time.monotonic() + 2 * TIMEOUT_S  # noqa: E731  of all deadlines
        monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
        return await fork(self)

    monkeypatch.setattr(Template, "fork", slow_fork)
    async with checking(deadline_s=TIMEOUT_S) as checker:
        assert await checker.check(regex("a")) == regex_source("a")


async def test_a_grammar_that_needs_too_much_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For its memory, not its time: it has an hour."""
    monkeypatch.setattr(module, "_TRIAL_BYTES", 32 * 1024**2)
    async with checking(deadline_s=3600) as checker:
        assert await reason(checker, schema(ENDLESS)) in (DIED, "it needs too much memory")
        assert await checker.check(regex("a")) == regex_source("a")


class TestKilledProcess:
    async def test_is_replaced_if_it_was_idle(self, checker: GrammarChecker) -> None:
        await checker.check(regex("a"))
        (process,) = workers()
        process.kill()
        assert await checker.check(regex("b")) == regex_source("b")

    async def test_is_replaced_during_a_trial(
        self, checker: GrammarChecker, trials: list[bytes]
    ) -> None:
        await checker.check(regex("a"))
        (process,) = workers()
        process.suspend()  # as if it were busy
        task = asyncio.create_task(checker.check(regex("b")))
        await eventually(lambda: len(trials) == 2)
        process.kill()
        assert await task == regex_source("b")

    async def test_repeatedly_fails_only_that_grammar(
        self, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exchange = worker_process._exchange

        async def deadly(process: ForkedProcess, message: bytes) -> Any:
            process.kill()
            return await exchange(process, message)

        with monkeypatch.context() as patch:
            patch.setattr(worker_process, "_exchange", deadly)
            assert await reason(checker, regex("a")) == DIED
        assert await checker.check(regex("b")) == regex_source("b")


class TestTemplate:
    """The process of which the others are forked."""

    async def test_builds_the_table_once_for_all_processes(self) -> None:
        async with checking(num_workers=2) as checker:
            await checker.start()
            (template,) = templates()
            assert len(workers()) == 2
            workers()[0].kill()
            await asyncio.gather(checker.check(regex("a")), checker.check(regex("b")))
            assert templates() == [template]
            assert {worker.ppid() for worker in workers()} == {template.pid}

    async def test_has_processes_before_the_first_grammar_comes(
        self, trials: list[dict[str, Any]]
    ) -> None:
        async with checking(num_workers=2) as checker:
            await checker.start()
            before = workers()
            assert len(before) == 2
            await checker.check(schema({"type": "integer"}))
            assert workers() == before
            assert len(trials) == 1

    async def test_is_replaced_after_its_death(self, checker: GrammarChecker) -> None:
        await checker.check(regex("a"))
        (template,) = templates()
        (worker,) = workers()
        template.kill()
        await eventually(lambda: not _is_alive(worker))
        assert await checker.check(regex("b")) == regex_source("b")
        assert templates() != [template]

    async def test_survives_a_caller_that_leaves_while_it_forks(
        self, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await checker.start()
        (template,) = templates()
        workers()[0].kill()
        forking = asyncio.Event()
        number_of = Template._number_of

        async def slow(self: Template, theirs: socket.socket) -> int:
            forking.set()
            await asyncio.sleep(0)
            return await number_of(self, theirs)

        monkeypatch.setattr(Template, "_number_of", slow)
        caller = asyncio.create_task(checker.check(regex("b")))
        await forking.wait()
        caller.cancel()
        await asyncio.wait([caller])
        assert await checker.check(regex("c")) == regex_source("c")
        assert templates() == [template]
        await eventually(lambda: len(workers()) == 1)

    async def test_lets_grammars_wait_for_a_start_that_goes_on(
        self, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        going_on = asyncio.Event()

        async def report(_: Template) -> str:
            await going_on.wait()
            return "no vocabulary"

        monkeypatch.setattr(Template, "start", report)
        starting = asyncio.create_task(checker.start())
        await asyncio.sleep(0)
        asking = asyncio.create_task(refusal(checker, regex("a")))
        await asyncio.sleep(0)
        assert not asking.done()
        going_on.set()
        assert "no vocabulary" in (await asking).message
        await starting

    async def test_refuses_all_grammars_of_a_tokenizer_that_has_none(
        self, caplog: pytest.LogCaptureFixture, trials: list[dict[str, Any]]
    ) -> None:
        checker = GrammarChecker('{"model": {"type": "BPE"}}', 10, frozenset({0}))
        try:
            await checker.start()
            assert "no grammars with this model" in caplog.text
            error = await refusal(checker, regex("a"))
            assert error.kind is ErrorKind.VALIDATION
            assert "grammar is not supported: the model's tokenizer" in error.message
            assert trials == []
        finally:
            await checker.close()


class TestClose:
    async def test_leaves_no_process(self) -> None:
        async with checking(num_workers=2) as checker:
            await asyncio.gather(checker.check(regex("a")), checker.check(regex("b")))
            assert len(workers()) == 2
            await checker.close()
            assert templates() == workers() == []

    async def test_during_a_trial_leaves_no_process(self, trials: list[bytes]) -> None:
        async with checking(num_workers=2) as checker:
            await checker.check(regex("a"))
            tasks = [asyncio.create_task(checker.check(schema(ENDLESS)))]
            await eventually(lambda: len(trials) == len(workers()) == 2)
            await checker.close()
            assert templates() == workers() == []
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]

    async def test_after_the_last_caller_left_leaves_no_process(self, trials: list[bytes]) -> None:
        async with checking() as checker:
            await checker.check(regex("a"))
            caller = asyncio.create_task(checker.check(schema(ENDLESS)))
            await eventually(lambda: len(trials) == 2)
            caller.cancel()
            await asyncio.wait([caller])
            await checker.close()
            assert templates() == workers() == []


SERVICE = """
import asyncio, sys
from service.grammar.spec import Grammar
from tests.service.grammar.checking import ENDLESS, checking

async def main():
    async with checking() as checker:
        await checker.check(Grammar(kind="regex", value="a"))
        print("ready", flush=True)
        await checker.check(Grammar(kind="json", value=ENDLESS))

asyncio.run(main())
"""


@pytest.fixture
def service() -> Iterator[subprocess.Popen[str]]:
    """Another process with a checker that is busy with a grammar."""
    with ready_process(SERVICE) as process:
        yield process


async def test_a_process_dies_with_its_service(service: subprocess.Popen[str]) -> None:
    (worker,) = workers(service.pid)
    await eventually(_is_busy(worker))
    service.send_signal(signal.SIGKILL)
    await eventually(lambda: not _is_alive(worker))


def _is_busy(process: psutil.Process) -> Callable[[], bool]:
    """Whether it uses the processor from now on: it is compiling a grammar."""
    before = process.cpu_times().user
    return lambda: process.cpu_times().user > before + 0.05


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_the_service_never_loads_the_grammar_library() -> None:
    """Only the worker processes load it, which may be killed."""
    code = "import sys, service.app; print('llguidance' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert loaded.stdout == "False\n"
