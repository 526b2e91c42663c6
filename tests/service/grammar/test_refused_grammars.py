"""Which grammars are refused, and with which error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.grammar.backend_llguidance import json_source
from service.errors import ErrorKind
from service.grammar.checker import MAX_GRAMMAR_BYTES, GrammarChecker
from service.grammar.spec import Grammar
from tests.service.grammar.checking import checking, reason, refusal, regex, schema, workers


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
    async def test_invalid_regex(self, checker: GrammarChecker, pattern: str) -> None:
        assert "regex" in await reason(checker, regex(pattern))

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (
                {"type": "array", "uniqueItems": True},
                '"uniqueItems" cannot be enforced, at #/properties/x',
            ),
            ({"not": {"format": "date"}}, '"not" cannot be enforced, at #/properties/x'),
            ({"enum": [2**53 + 1, 0.5]}, f"the number {2**53 + 1} cannot be enforced exactly"),
            ({"type": "strong"}, "strong"),
            ({"$ref": "#/$defs/nowhere"}, "nowhere"),
            ({"$ref": "https://example.org/schema.json"}, "example.org"),
            ({"type": "object", "properties": []}, "properties"),
            (False, ""),
        ],
    )
    async def test_keywords_that_cannot_be_enforced(
        self, checker: GrammarChecker, value: Any, words: str
    ) -> None:
        wrapped = {"type": "object", "properties": {"x": value}, "required": ["x"]}
        assert words in await reason(checker, schema(wrapped))

    async def test_invalid_json(self, checker: GrammarChecker) -> None:
        assert "column 2" in await reason(checker, schema("{"))

    @pytest.mark.parametrize("text", ['{"const": "\\ud800"}', "[" * 100_000, "9" * 5000])
    async def test_json_that_cannot_be_encoded(self, checker: GrammarChecker, text: str) -> None:
        assert await reason(checker, schema(text))

    @pytest.mark.parametrize("text", ["[1]", "true", "null", '"a"', "1"])
    async def test_json_text_that_is_no_object(self, checker: GrammarChecker, text: str) -> None:
        assert await reason(checker, schema(text)) == "it is not an object"

    @pytest.mark.parametrize("value", [[1], True, 5])
    async def test_neither_object_nor_text(self, checker: GrammarChecker, value: Any) -> None:
        error = await refusal(checker, schema(value))
        assert error.message == "Input validation error: grammar is not supported"
        assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")

    async def test_too_deep(self, checker: GrammarChecker) -> None:
        too_deep = "it is nested more than 100 deep"
        for value in (nested(49), {"items": nested(49)}):
            assert await checker.check(schema(value))
            assert await checker.check(schema(json.dumps(value), or_text=True))
        for value in (nested(50), nested(400)):
            assert await reason(checker, schema(value)) == too_deep
            assert await reason(checker, schema(json.dumps(value))) == too_deep

    async def test_too_large(self, checker: GrammarChecker, trials: list[bytes]) -> None:
        pattern = "a" * MAX_GRAMMAR_BYTES
        text = await reason(checker, regex(pattern))
        assert text.startswith(f"it must have at most {MAX_GRAMMAR_BYTES} bytes. Given: ")
        assert trials == []

    @pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**300])
    @pytest.mark.parametrize("as_text", [False, True])
    async def test_a_number_that_would_be_rounded(
        self, checker: GrammarChecker, number: int, as_text: bool
    ) -> None:
        value = {"type": "array", "items": {"enum": [number]}}
        text = await reason(checker, schema(json.dumps(value) if as_text else value))
        assert text == f"the number {number} cannot be enforced exactly, at #/items/enum/0"

    async def test_a_number_of_thousands_of_digits(self, checker: GrammarChecker) -> None:
        assert "digits" in await reason(checker, schema({"maximum": 10**5000}))

    @pytest.mark.parametrize("kind", ["", "yaml"])
    async def test_missing_or_unknown_type(self, checker: GrammarChecker, kind: str) -> None:
        error = await refusal(checker, Grammar(kind=kind, value="a"))
        assert error.message.endswith("parameters.grammar: missing field `type`")
        assert (error.kind, error.field) == (ErrorKind.SHAPE, "parameters.grammar.type")

    @pytest.mark.parametrize("kind", ["json", "regex"])
    async def test_missing_value(self, checker: GrammarChecker, kind: str) -> None:
        error = await refusal(checker, Grammar(kind=kind, value=None))
        assert error.message.endswith("parameters.grammar: missing field `value`")
        assert (error.kind, error.field) == (ErrorKind.SHAPE, "parameters.grammar.value")

    @pytest.mark.parametrize("value", [5, True, {"a": 1}, ["a"]])
    async def test_regex_that_is_no_string(self, checker: GrammarChecker, value: Any) -> None:
        error = await refusal(checker, regex(value))
        assert error.message.endswith("parameters.grammar.value: expected a string")
        assert error.kind is ErrorKind.SHAPE

    @pytest.mark.parametrize("grammar", [regex("a"), schema({}), Grammar(kind="", value=None)])
    async def test_every_grammar_when_grammars_are_disabled(self, grammar: Grammar) -> None:
        async with checking(enabled=False) as checker:
            error = await refusal(checker, grammar)
            assert error.message == "Input validation error: grammar is not supported"
            assert (error.kind, error.field) == (ErrorKind.VALIDATION, "parameters.grammar")
            assert workers() == []


def nested(depth: int) -> dict[str, Any]:
    """A schema of 2 * depth + 1 nested objects."""
    value: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"x": value}}
    return value


async def test_formats_that_nobody_knows_are_refused_if_they_are_strict() -> None:
    value = {"type": "string", "format": "klingon"}
    async with checking(strict_formats=True) as checker:
        assert await reason(checker, schema(value)) == 'the "format" klingon is unknown, at #'
    async with checking() as checker:
        assert await checker.check(schema(value)) == json_source(value)


async def test_best_effort_ignores_what_cannot_be_enforced() -> None:
    value = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    async with checking(best_effort=True) as checker:
        assert await checker.check(schema(value)) == json_source(value, best_effort=True)
        assert "strong" in await reason(checker, schema({"type": "strong"}))
