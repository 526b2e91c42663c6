"""Grammars that are accepted: one trial for all callers of each, and a bounded cache."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.grammar.backend_llguidance import json_source, regex_source
from service.errors import ServiceError
from service.grammar import checker as module
from service.grammar.checker import GrammarChecker
from tests.service.fakes import eventually
from tests.service.grammar.checking import ENDLESS, SCHEMA, checking, reason, regex, schema, workers


class TestAcceptedGrammar:
    async def test_returns_the_source_for_the_engine(self, checker: GrammarChecker) -> None:
        assert await checker.check(regex("[0-9]+")) == regex_source("[0-9]+")
        assert await checker.check(schema(SCHEMA)) == json_source(SCHEMA)
        assert len(workers()) == 1

    async def test_may_be_json_text(self, checker: GrammarChecker) -> None:
        assert await checker.check(schema(json.dumps(SCHEMA))) == json_source(SCHEMA)

    async def test_or_text_changes_the_source(self, checker: GrammarChecker) -> None:
        source = await checker.check(schema(SCHEMA, or_text=True))
        assert source == json_source(SCHEMA, or_text=True)
        assert source != await checker.check(schema(SCHEMA))

    async def test_concurrent_callers_share_one_trial(
        self, checker: GrammarChecker, trials: list[bytes]
    ) -> None:
        sources = await asyncio.gather(*(checker.check(schema(SCHEMA)) for _ in range(20)))
        assert set(sources) == {json_source(SCHEMA)}
        assert len(trials) == 1

    async def test_result_is_cached(self, checker: GrammarChecker, trials: list[bytes]) -> None:
        first = await checker.check(schema(SCHEMA))
        workers()[0].kill()  # it is not needed any more
        assert await checker.check(schema(json.dumps(SCHEMA))) == first
        assert len(trials) == 1

    async def test_similar_grammars_have_separate_trials(
        self, checker: GrammarChecker, trials: list[bytes]
    ) -> None:
        for grammar in (regex("a"), regex("b"), schema({}), schema({}, or_text=True)):
            await checker.check(grammar)
        assert len(trials) == 4

    async def test_does_not_wait_while_another_process_is_idle(self, trials: list[bytes]) -> None:
        async with checking(num_workers=2) as checker:
            slow = asyncio.create_task(checker.check(schema(ENDLESS)))
            await eventually(lambda: len(trials) == 1)
            assert await checker.check(regex("a")) == regex_source("a")
            assert not slow.done()
            assert len(workers()) == 2
            slow.cancel()


class TestCache:
    async def test_is_bounded(
        self,
        checker: GrammarChecker,
        trials: list[bytes],
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
        await checker.check(grammars[0])  # the oldest was evicted
        assert len(trials) == 11

    async def test_evicts_the_least_recently_used_result(
        self,
        checker: GrammarChecker,
        trials: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        await checker.check(regex("a" * 300))
        await checker.check(regex("b" * 300))
        await checker.check(regex("a" * 300))
        monkeypatch.setattr(module, "_CACHE_BYTES", checker._known_bytes)
        await checker.check(regex("c" * 300))
        await checker.check(regex("a" * 300))
        assert len(trials) == 3

    async def test_holds_refusals_too(self, checker: GrammarChecker, trials: list[bytes]) -> None:
        assert await reason(checker, regex("[")) == await reason(checker, regex("["))
        assert len(trials) == 1


class TestCancelledCaller:
    async def test_does_not_cancel_other_callers(
        self, checker: GrammarChecker, trials: list[bytes]
    ) -> None:
        callers = [asyncio.create_task(checker.check(schema(SCHEMA))) for _ in range(3)]
        await eventually(lambda: len(trials) == 1)
        callers[0].cancel()
        assert await callers[1] == await callers[2] == json_source(SCHEMA)
        assert callers[0].cancelled()
        assert len(trials) == 1

    async def test_ends_the_trial_as_the_last_caller(
        self, checker: GrammarChecker, trials: list[bytes]
    ) -> None:
        callers = [asyncio.create_task(checker.check(schema(ENDLESS))) for _ in range(2)]
        await eventually(lambda: len(trials) == 1)
        for caller in callers:
            caller.cancel()
        assert await checker.check(regex("a")) == regex_source("a")  # the process is free again
        assert len(trials) == 2

    async def test_may_ask_again(self, checker: GrammarChecker, trials: list[bytes]) -> None:
        caller = asyncio.create_task(checker.check(schema(SCHEMA)))
        await eventually(lambda: len(trials) == 1)
        caller.cancel()
        await asyncio.wait([caller])
        assert await checker.check(schema(SCHEMA)) == json_source(SCHEMA)
        assert len(trials) == 2


class Watcher:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.trials: list[tuple[str, bool]] = []
        self.num_known = 0

    def grammar_tried(self, outcome: str, seconds: float) -> None:
        self.trials.append((outcome, seconds > 0))

    def grammar_known(self) -> None:
        self.num_known += 1


class TestWatcher:
    async def test_is_told_of_trials_and_of_what_needs_none(self) -> None:
        watcher = Watcher()
        async with checking(watcher=watcher) as checker:
            for _ in range(3):
                await checker.check(regex("[0-9]+"))
            with pytest.raises(ServiceError):
                await checker.check(regex("("))
        assert watcher.trials == [("compiled", True), ("refused", True)]
        assert watcher.num_known == 2

    async def test_is_told_of_trials_that_take_too_long_or_are_abandoned(
        self, trials: list[bytes]
    ) -> None:
        watcher = Watcher()
        async with checking(watcher=watcher, num_workers=2, deadline_s=0.05) as checker:
            with pytest.raises(ServiceError):
                await checker.check(schema(ENDLESS))
        async with checking(watcher=watcher) as checker:
            asking = asyncio.create_task(checker.check(schema(ENDLESS)))
            await eventually(lambda: len(trials) == 2)
            asking.cancel()
            await eventually(lambda: len(watcher.trials) == 2)
        outcomes = [outcome for outcome, _ in watcher.trials]
        assert outcomes[0] in ("failed", "overloaded")  # as much as the machine lets it run
        assert outcomes[1] == "abandoned"

    async def test_holds_so_many_however_short_they_are(
        self,
        checker: GrammarChecker,
        trials: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "_MAX_KNOWN", 2)
        for grammar in map(regex, "abca"):
            await checker.check(grammar)
            assert len(checker._known) <= 2
        assert len(trials) == 4  # the first was evicted
        await checker.check(regex("c"))
        assert len(trials) == 4

    def test_counts_memory_and_not_characters(self) -> None:
        narrow, wide = (module._size(b"", {"source": text * 1000}) for text in ("a", "🐈"))
        assert wide - narrow > 2900
        assert module._size(b"", {}) > 0
