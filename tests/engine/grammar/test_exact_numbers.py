"""Integers beyond float64's are enforced exactly, or refused; never rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.grammar.backend_llguidance import json_source
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammar_cases import record
from tests.engine.grammar.grammars import accepts, compile_source, spell, walk

LARGE = 2512292042121000001
ROUNDED = 2512292042120999936  # the float64 next to it


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [LARGE]},
        {"const": LARGE},
        {"type": "integer", "enum": [7, LARGE], "description": "a number"},
        {"enum": [-LARGE, LARGE, 10**30]},
        {"enum": [2**63]},
        {"const": 2**64},
        {"enum": [-(2**63), 1]},
    ],
)
def test_a_choice_of_integers_is_exact(schema: dict[str, Any]) -> None:
    source = json_source(schema)
    for number in schema.get("enum", [schema.get("const")]):
        assert accepts(compile_source(source), str(number))
    assert not accepts(compile_source(source), str(ROUNDED))
    assert not accepts(compile_source(source), str(LARGE + 1))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"enum": [LARGE]}}, "required": ["a"]},
        record({"a": {"type": "integer", "minimum": LARGE}}),
        {"minimum": LARGE},
        record({"a": {"type": "integer", "exclusiveMinimum": 2**53}}),
        {"const": {"a": [LARGE]}},
        {"const": {"a": [2**63]}},
        {"anyOf": [{"enum": [-(2**63), "text"]}, {"type": "null"}]},
        {"anyOf": [{"const": LARGE}, {"type": "null"}]},
        {"enum": [LARGE, "text"]},
        {"type": "integer", "multipleOf": 2**53 + 1},
        {"type": "integer", "multipleOf": 2**33},
        {"type": "number", "multipleOf": 0.1 + 0.2},
        {"maximum": -(10**400)},
        {"const": 1e999},
    ],
)
def test_other_places_for_such_numbers_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="cannot be enforced exactly"):
        json_source(schema)


@pytest.mark.parametrize("number", [2**53, -(2**53), 2**60, 9007199254740994, 2**62, -(2**62)])
def test_numbers_that_float64_holds_are_taken(number: int) -> None:
    source = json_source({"type": "object", "properties": {"a": {"const": number}}})
    assert accepts(compile_source(source), f'{{"a": {number}}}')


INT64 = (-(2**63), 2**63 - 1)


@pytest.mark.parametrize(
    ("low", "high"),
    [INT64, (LARGE, LARGE + 9), (2**53 + 1, 2**53 + 1), (-(10**30), 7), (2**64 - 3, 2**64)],
)
def test_bounds_of_an_integer_are_exact(low: int, high: int) -> None:
    for schema in (
        {"type": "integer", "minimum": low, "maximum": high, "title": "a number"},
        {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
    ):
        source = json_source(schema)
        for number in (low, high, (low + high) // 2):
            assert accepts(compile_source(source), str(number))
        for number in (low - 1, high + 1, 10 * high, -10 * abs(low)):
            assert not accepts(compile_source(source), str(number)), number


@pytest.mark.parametrize("bound", [1.7976931348623157e308, 1e21, 2**63 - 1, 10**19, 10**400, 1e999])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_bounds_that_are_far_away_are_taken(kind: str, bound: float) -> None:
    schema = record({"a": {"type": kind, "minimum": 0, "maximum": bound}})
    matcher = compile_source(json_source(schema))
    for number in (0, 5, 2**53 + 1, 10**18):
        assert accepts(matcher.copy(), f'{{"a": {number}}}')
    assert not accepts(matcher.copy(), '{"a": -1}')
    matcher = compile_source(json_source(record({"a": {"type": kind, "exclusiveMinimum": -bound}})))
    for number in (0, -5, -(10**18)):
        assert accepts(matcher.copy(), f'{{"a": {number}}}')


@pytest.mark.parametrize("bound", [{"minimum": 0}, {"exclusiveMaximum": 1}, {"maximum": 1e300}])
@pytest.mark.parametrize("seed", range(3))
def test_a_number_with_a_bound_has_an_end(bound: Any, seed: int) -> None:
    source = json_source(record({"a": {"type": "number", **bound}}))
    matcher = compile_source(source)
    for text in ("0", "-0.5", "0.25", "-1.0000000001", "0.1234567891"):
        is_within = float(text) >= bound.get("minimum", -9)
        assert accepts(matcher.copy(), f'{{"a": {text}}}') == is_within, text
    digits = walk(matcher, seed, num_tokens=200)
    assert len(digits) < 60
    assert float(spell(digits).decode().split()[1].rstrip("}")) is not None


def test_numbers_between_near_bounds_are_taken() -> None:
    source = json_source({"type": "number", "minimum": 0.3, "maximum": 0.3000000001})
    assert accepts(compile_source(source), "0.30000000005")


@pytest.mark.parametrize(
    "note", ["examples", "default", "title", "description", "$comment", "example"]
)
@pytest.mark.parametrize("value", [10**400, [1e999, {"minimum": 2**53 + 1}], {"enum": [LARGE]}])
def test_annotations_are_never_looked_at(note: str, value: Any) -> None:
    schema = record({"a": {"type": "boolean", note: value}}) | {note: value}
    assert accepts(compile_source(json_source(schema)), '{"a": true}')
    named = record({note: {"type": "boolean"}})
    assert accepts(compile_source(json_source(named)), f'{{"{note}": true}}')


@pytest.mark.parametrize("number", [1e21, 1.5e300, 0.1, 1e-7, -2.5])
def test_a_constant_with_a_fraction_or_an_exponent_is_taken(number: float) -> None:
    source = json_source(record({"a": {"const": number}}))
    digits = np.format_float_positional(number, trim="-")
    assert accepts(compile_source(source), f'{{"a": {digits}}}')
