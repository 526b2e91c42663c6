"""Which library enforces a grammar: the one that is asked for, or the one that is exact."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar import backend_outlines
from engine.grammar.backend_llguidance import json_source, regex_source
from service.grammar.spec import Grammar
from service.launch import settings as module
from service.launch.options import SettingsError
from service.launch.settings import Settings
from tests.service.grammar.checking import checking, reason, regex, schema

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# What only outlines-core enforces exactly.
ASSERTION = regex(r"[a-z]+(?-u:\b)[-a-z]{2}")
LARGE = schema({"enum": [2512292042121000001, "none"]})
# What only llguidance enforces exactly.
RANGE: dict[str, Any] = {"type": "integer", "minimum": 3, "maximum": 70}


async def test_auto_takes_the_faster_library_where_it_is_exact() -> None:
    async with checking() as checker:
        assert await checker.check(schema(PERSON)) == json_source(PERSON)
        assert await checker.check(schema(RANGE)) == json_source(RANGE)
        assert await checker.check(regex("a|b")) == regex_source("a|b")


@pytest.mark.parametrize("grammar", [ASSERTION, LARGE])
async def test_auto_takes_the_other_one_where_only_that_is_exact(grammar: Grammar) -> None:
    async with checking() as checker:
        assert backend_outlines.is_ours(await checker.check(grammar))
    async with checking(backend="llguidance") as checker:
        assert "outlines" not in await reason(checker, grammar)


async def test_auto_tells_the_first_librarys_reason_if_none_is_exact() -> None:
    async with checking() as checker:
        unable = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
        told = await reason(checker, schema(unable))
    async with checking(backend="llguidance") as checker:
        assert told == await reason(checker, schema(unable))


async def test_outlines_takes_what_it_enforces_and_refuses_the_rest() -> None:
    async with checking(backend="outlines") as checker:
        assert await checker.check(regex("a|b")) == backend_outlines.regex_source("a|b")
        assert await checker.check(schema(PERSON)) == backend_outlines.json_source(PERSON)
        told = await reason(checker, schema(RANGE))
        assert told == "outlines-core cannot enforce `maximum` at #/maximum"


async def test_texts_that_may_be_calls_are_not_for_outlines() -> None:
    async with checking(backend="outlines") as checker:
        either = await checker.check(schema(PERSON, or_text=True))
        assert either == json_source(PERSON, or_text=True)


def test_the_library_must_be_there_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(grammar_backend="outlines").grammar_backend == "outlines"
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    for other in ("auto", "llguidance"):
        Settings(grammar_backend=other)
    with pytest.raises(SettingsError, match="extra `outlines`"):
        Settings(grammar_backend="outlines")
