"""Grammars before anything is queued: what is refused, and that trying them out hurts nobody."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psutil
import pytest

from engine.grammar.backend_llguidance import json_source, regex_source
from service.errors import ErrorKind, ServiceError
from service.grammar import checker as module
from service.grammar.checker import MAX_GRAMMAR_BYTES, GrammarChecker
from service.grammar.spec import Grammar
from tests.paths import REPOSITORY
from tests.service.fakes import MODEL, TIMEOUT_S, demo_tokenizer, eventually

VOCAB_SIZE = json.loads((MODEL / "config.json").read_text())["vocab_size"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
ENDLESS = {"type": "integer", "multipleOf": 9999991}  # takes much longer than anybody waits
LATE = "it takes more than 0.5 s to compile"
DIED = "it needs too much memory or time to compile"
WORKER = "service.grammar.worker"


def regex(pattern: Any) -> Grammar:
    return Grammar(kind="regex", value=pattern)


def schema(value: Any, **options: Any) -> Grammar:
    return Grammar(kind="json", value=value, **options)


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The processes that a process has for its grammars."""
    children = psutil.Process(parent).children()
    return [child for child in children if WORKER in _command_line(child)]


def _command_line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No grammar counts as slow, however busy this machine is."""
    monkeypatch.setattr(module, "_SOON_S", TIMEOUT_S)


@asynccontextmanager
async def checking(**options: Any) -> AsyncGenerator[GrammarChecker]:
    tokenizer = demo_tokenizer()
    options = {"deadline_s": TIMEOUT_S, "num_workers": 1, **options}
    checker = GrammarChecker(tokenizer.to_json(), VOCAB_SIZE, tokenizer.eos_token_ids, **options)
    try:
        yield checker
    finally:
        await checker.close()
        assert workers() == []


@pytest.fixture
async def checker() -> AsyncGenerator[GrammarChecker]:
    """One process, and all the time that a busy machine may need."""
    async with checking() as checker:
        yield checker


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every grammar that is given to a process, as it comes."""
    seen: list[dict[str, Any]] = []
    ask = module._Worker.ask

    async def spy(self: Any, request: dict[str, Any], deadline_s: float) -> dict[str, str]:
        seen.append(request)
        return await ask(self, request, deadline_s)

    monkeypatch.setattr(module._Worker, "ask", spy)
    return seen


async def refusal(checker: GrammarChecker, grammar: Grammar) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await checker.check(grammar)
    return refused.value


async def reason(checker: GrammarChecker, grammar: Grammar) -> str:
    """Why a grammar is refused, which is said in one line."""
    error = await refusal(checker, grammar)
    assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")
    prefix = "Input validation error: grammar is not valid: "
    assert error.message.startswith(prefix)
    assert "\n" not in error.message
    return error.message.removeprefix(prefix)


class TestAGoodGrammar:
    async def test_becomes_a_source(self, checker: GrammarChecker) -> None:
        assert await checker.check(regex("[0-9]+")) == regex_source("[0-9]+")
        assert await checker.check(schema(SCHEMA)) == json_source(SCHEMA)
        assert len(workers()) == 1

    async def test_may_come_as_text(self, checker: GrammarChecker) -> None:
        assert await checker.check(schema(json.dumps(SCHEMA))) == json_source(SCHEMA)

    async def test_may_leave_the_choice_of_an_answer_in_words(
        self, checker: GrammarChecker
    ) -> None:
        source = await checker.check(schema(SCHEMA, or_text=True))
        assert source == json_source(SCHEMA, or_text=True)
        assert source != await checker.check(schema(SCHEMA))

    async def test_is_tried_once_however_many_ask(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        sources = await asyncio.gather(*(checker.check(schema(SCHEMA)) for _ in range(20)))
        assert set(sources) == {json_source(SCHEMA)}
        assert len(trials) == 1

    async def test_is_remembered(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        first = await checker.check(schema(SCHEMA))
        workers()[0].kill()  # nobody needs it any more
        assert await checker.check(schema(json.dumps(SCHEMA))) == first
        assert len(trials) == 1

    async def test_is_told_from_others_like_it(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        for grammar in (regex("a"), regex("b"), schema({}), schema({}, or_text=True)):
            await checker.check(grammar)
        assert len(trials) == 4

    async def test_waits_for_no_other_process_than_it_needs(
        self, trials: list[dict[str, Any]]
    ) -> None:
        async with checking(num_workers=2) as checker:
            slow = asyncio.create_task(checker.check(schema(ENDLESS)))
            await eventually(lambda: len(trials) == 1)
            assert await checker.check(regex("a")) == regex_source("a")
            assert not slow.done()
            assert len(workers()) == 2
            slow.cancel()


class TestWhatIsRemembered:
    async def test_is_bounded(
        self,
        checker: GrammarChecker,
        trials: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "_CACHE_BYTES", 4096)
        grammars = [regex(f"{number}" * 300) for number in range(10)]
        for grammar in grammars:
            await checker.check(grammar)
            assert checker._known_bytes <= 4096
        known = [module._size(*item) for item in checker._known.items()]
        assert 1 < len(known) < 10
        assert checker._known_bytes == sum(known)
        await checker.check(grammars[-1])
        assert len(trials) == 10
        await checker.check(grammars[0])  # the oldest had to go
        assert len(trials) == 11

    async def test_goes_when_it_was_asked_for_least_recently(
        self,
        checker: GrammarChecker,
        trials: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        await checker.check(regex("a" * 300))
        await checker.check(regex("b" * 300))
        await checker.check(regex("a" * 300))
        monkeypatch.setattr(module, "_CACHE_BYTES", checker._known_bytes)
        await checker.check(regex("c" * 300))
        await checker.check(regex("a" * 300))
        assert len(trials) == 3

    async def test_can_be_a_refusal(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        assert await reason(checker, regex("[")) == await reason(checker, regex("["))
        assert len(trials) == 1


async def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_SHARE", 0)  # this machine may be busy
    async with checking() as checker:
        await checker.check(regex("a"))  # the process is up: that is not the grammar's time
        (before,) = workers()
        checker._deadline_s = 0.5
        assert await reason(checker, schema(ENDLESS)) == LATE
        assert not before.is_running()
        assert workers() == []
        checker._deadline_s = TIMEOUT_S
        assert await checker.check(regex("b")) == regex_source("b")
        (after,) = workers()
        assert after != before


async def test_a_process_that_gets_no_processor_is_not_the_grammars_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MIN_SHARE", 10_000)  # of a processor: more than anybody has
    async with checking() as checker:
        await checker.check(regex("a"))
        checker._deadline_s = 0.5
        error = await refusal(checker, schema(ENDLESS))
        assert (error.kind, error.message) == (ErrorKind.OVERLOADED, "Model is overloaded")
        assert workers() == []


async def test_a_slow_grammar_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert not slow.done(), "who came first goes on"
        slow.cancel()
        await eventually(lambda: checker._num_slow == 0)
        monkeypatch.setattr(module, "_SOON_S", TIMEOUT_S)
        assert await checker.check(regex("c")) == regex_source("c")
        assert len(workers()) == 1


async def test_processes_give_way_to_everybody_else() -> None:
    async with checking() as checker:
        await checker.check(regex("a"))
        (worker,) = workers()
        assert os.sched_getscheduler(worker.pid) == os.SCHED_IDLE
        assert os.getsid(worker.pid) == worker.pid


async def test_a_process_may_come_up_slowly() -> None:
    async with checking(deadline_s=0.1) as checker:  # less than Python itself takes
        assert await checker.check(regex("a")) == regex_source("a")


async def test_a_grammar_that_grows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its memory, not by its time: it has hours, and little more memory than an idle process."""
    async with checking() as checker:
        await checker.check(regex("a"))
        (idle,) = workers()
        num_bytes = idle.memory_info().vms
    monkeypatch.setattr(module, "_WORKER_BYTES", num_bytes + 32 * 1024**2)
    async with checking(deadline_s=3600) as checker:
        assert await reason(checker, schema(ENDLESS)) in (DIED, "it needs too much memory")
        assert await checker.check(regex("a")) == regex_source("a")


class TestAProcessThatSomebodyElseKills:
    async def test_while_it_is_idle_costs_nobody(self, checker: GrammarChecker) -> None:
        await checker.check(regex("a"))
        (process,) = workers()
        process.kill()
        assert await checker.check(regex("b")) == regex_source("b")

    async def test_at_work_is_replaced(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        await checker.check(regex("a"))
        (process,) = workers()
        process.suspend()  # in the middle of the work, as far as anybody can tell
        task = asyncio.create_task(checker.check(regex("b")))
        await eventually(lambda: len(trials) == 2)
        process.kill()
        assert await task == regex_source("b")

    async def test_again_and_again_costs_that_grammar_only(self, checker: GrammarChecker) -> None:
        stop = asyncio.Event()

        async def kill() -> None:
            while not stop.is_set():
                for process in workers():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                await asyncio.sleep(0.001)

        killer = asyncio.create_task(kill())
        assert await reason(checker, regex("a")) == DIED
        stop.set()
        await killer
        assert await checker.check(regex("b")) == regex_source("b")


class TestRefused:
    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("a{100000}", "it leaves no choice about more than 2048 tokens"),
            ("(a|aa){50000}", "too many expressions"),
        ],
    )
    async def test_too_complex(self, checker: GrammarChecker, pattern: str, words: str) -> None:
        assert words in await reason(checker, regex(pattern))

    @pytest.mark.parametrize("pattern", ["[", "(", "a{2,1}", "(?=a)b", "\\1"])
    async def test_no_expression(self, checker: GrammarChecker, pattern: str) -> None:
        assert "regex" in await reason(checker, regex(pattern))

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
            ({"not": {"type": "array"}}, 'Unimplemented keys: ["not"]'),
            ({"type": "string", "format": "klingon"}, "Unknown format: klingon"),
            ({"type": "strong"}, "strong"),
            ({"$ref": "#/$defs/nowhere"}, "nowhere"),
            ({"$ref": "https://example.org/schema.json"}, "example.org"),
            ({"type": "object", "properties": []}, "properties"),
            (False, ""),
        ],
    )
    async def test_what_cannot_be_enforced(
        self, checker: GrammarChecker, value: Any, words: str
    ) -> None:
        wrapped = {"type": "object", "properties": {"x": value}, "required": ["x"]}
        assert words in await reason(checker, schema(wrapped))

    async def test_no_json(self, checker: GrammarChecker) -> None:
        assert "column 2" in await reason(checker, schema("{"))

    @pytest.mark.parametrize("text", ['{"const": "\\ud800"}', "[" * 100_000, "9" * 5000])
    async def test_json_that_cannot_be_passed_on(self, checker: GrammarChecker, text: str) -> None:
        assert await reason(checker, schema(text))

    @pytest.mark.parametrize("text", ["[1]", "true", "null", '"a"', "1"])
    async def test_no_object(self, checker: GrammarChecker, text: str) -> None:
        assert await reason(checker, schema(text)) == "it is not an object"

    @pytest.mark.parametrize("value", [[1], True, 5])
    async def test_neither_object_nor_text(self, checker: GrammarChecker, value: Any) -> None:
        error = await refusal(checker, schema(value))
        assert error.message == "Input validation error: grammar is not supported"
        assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")

    async def test_too_deep(self, checker: GrammarChecker) -> None:
        assert await checker.check(schema(nested(29)))
        assert await reason(checker, schema(nested(30))) == "it is nested more than 60 deep"
        assert await reason(checker, schema(json.dumps(nested(400)))) == (
            "it is nested more than 60 deep"
        )

    async def test_too_large(self, checker: GrammarChecker, trials: list[dict[str, Any]]) -> None:
        pattern = "a" * MAX_GRAMMAR_BYTES
        said = await reason(checker, regex(pattern))
        assert said.startswith(f"it must have at most {MAX_GRAMMAR_BYTES} bytes. Given: ")
        assert trials == []

    @pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**300])
    async def test_a_number_that_is_too_large(self, checker: GrammarChecker, number: int) -> None:
        said = await reason(checker, schema({"type": "integer", "maximum": number}))
        assert said == "it has a number of more than 64 bits"

    @pytest.mark.parametrize("kind", ["", "yaml"])
    async def test_no_type(self, checker: GrammarChecker, kind: str) -> None:
        error = await refusal(checker, Grammar(kind=kind, value="a"))
        assert error.message.endswith("parameters.grammar: missing field `type`")
        assert (error.kind, error.field) == (ErrorKind.SHAPE, "parameters.grammar.type")

    @pytest.mark.parametrize("kind", ["json", "regex"])
    async def test_no_value(self, checker: GrammarChecker, kind: str) -> None:
        error = await refusal(checker, Grammar(kind=kind, value=None))
        assert error.message.endswith("parameters.grammar: missing field `value`")
        assert (error.kind, error.field) == (ErrorKind.SHAPE, "parameters.grammar.value")

    @pytest.mark.parametrize("value", [5, True, {"a": 1}, ["a"]])
    async def test_an_expression_that_is_no_text(self, checker: GrammarChecker, value: Any) -> None:
        error = await refusal(checker, regex(value))
        assert error.message.endswith("parameters.grammar.value: expected a string")
        assert error.kind is ErrorKind.SHAPE

    @pytest.mark.parametrize("grammar", [regex("a"), schema({}), Grammar(kind="", value=None)])
    async def test_everything_where_there_are_none(self, grammar: Grammar) -> None:
        async with checking(enabled=False) as checker:
            error = await refusal(checker, grammar)
            assert error.message == "Input validation error: grammar is not supported"
            assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")
            assert workers() == []


def nested(depth: int) -> dict[str, Any]:
    """A schema of twice as many objects, and one, within each other."""
    value: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"x": value}}
    return value


async def test_best_effort_ignores_what_cannot_be_enforced() -> None:
    value = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    async with checking(best_effort=True) as checker:
        assert await checker.check(schema(value)) == json_source(value, best_effort=True)
        assert "strong" in await reason(checker, schema({"type": "strong"}))


class TestACallerWhoLeaves:
    async def test_takes_nobody_along(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        callers = [asyncio.create_task(checker.check(schema(SCHEMA))) for _ in range(3)]
        await eventually(lambda: len(trials) == 1)
        callers[0].cancel()
        assert await callers[1] == await callers[2] == json_source(SCHEMA)
        assert callers[0].cancelled()
        assert len(trials) == 1

    async def test_as_the_last_one_ends_the_trial(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        callers = [asyncio.create_task(checker.check(schema(ENDLESS))) for _ in range(2)]
        await eventually(lambda: len(trials) == 1)
        for caller in callers:
            caller.cancel()
        assert await checker.check(regex("a")) == regex_source("a")  # nothing was in its way
        assert len(trials) == 2

    async def test_may_come_back(
        self, checker: GrammarChecker, trials: list[dict[str, Any]]
    ) -> None:
        caller = asyncio.create_task(checker.check(schema(SCHEMA)))
        await eventually(lambda: len(trials) == 1)
        caller.cancel()
        await asyncio.wait([caller])
        assert await checker.check(schema(SCHEMA)) == json_source(SCHEMA)
        assert len(trials) == 2


class TestTheEnd:
    async def test_leaves_no_process(self) -> None:
        async with checking(num_workers=2) as checker:
            await asyncio.gather(checker.check(regex("a")), checker.check(regex("b")))
            assert len(workers()) == 2
            await checker.close()
            assert workers() == []

    async def test_in_the_middle_of_a_grammar_leaves_no_process(
        self, trials: list[dict[str, Any]]
    ) -> None:
        async with checking(num_workers=2) as checker:
            await checker.check(regex("a"))
            tasks = [asyncio.create_task(checker.check(schema(ENDLESS)))]
            await eventually(lambda: len(trials) == 2)
            assert len(workers()) == 2
            await checker.close()
            assert workers() == []
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]

    async def test_behind_the_last_caller_leaves_no_process(
        self, trials: list[dict[str, Any]]
    ) -> None:
        async with checking() as checker:
            await checker.check(regex("a"))
            caller = asyncio.create_task(checker.check(schema(ENDLESS)))
            await eventually(lambda: len(trials) == 2)
            caller.cancel()
            await asyncio.wait([caller])
            await checker.close()
            assert workers() == []


SERVICE = """
import asyncio, sys
from service.grammar.spec import Grammar
from tests.service.grammar.test_checker import ENDLESS, checking

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
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "."},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


async def test_a_process_dies_with_its_service(service: subprocess.Popen[str]) -> None:
    (worker,) = workers(service.pid)
    await eventually(_is_busy(worker))
    service.send_signal(signal.SIGKILL)
    await eventually(lambda: not _is_alive(worker))


def _is_busy(process: psutil.Process) -> Callable[[], bool]:
    """Whether it computes from now on: it is in the middle of a grammar."""
    before = process.cpu_times().user
    return lambda: process.cpu_times().user > before + 0.05


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_the_service_never_loads_the_grammar_library() -> None:
    """It belongs to the processes that try grammars out, which may be killed."""
    code = "import sys, service.app; print('llguidance' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert loaded.stdout == "False\n"
