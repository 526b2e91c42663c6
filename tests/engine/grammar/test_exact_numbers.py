"""Integers beyond float64's are enforced exactly, or refused; never rounded."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar.backend_llguidance import json_source
from engine.protocol.errors import GrammarError
from tests.engine.grammar.grammars import accepts, compile_source

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
        {"type": "integer", "minimum": LARGE},
        {"const": {"a": [LARGE]}},
        {"const": {"a": [2**63]}},
        {"anyOf": [{"enum": [-(2**63), "text"]}, {"type": "null"}]},
        {"anyOf": [{"const": LARGE}, {"type": "null"}]},
        {"enum": [LARGE, "text"]},
        {"type": "integer", "multipleOf": 2**53 + 1},
        {"maximum": 10**400},
    ],
)
def test_other_places_for_such_numbers_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="cannot be enforced exactly"):
        json_source(schema)


@pytest.mark.parametrize("number", [2**53, -(2**53), 2**60, 9007199254740994, 2**62, -(2**62)])
def test_numbers_that_float64_holds_are_taken(number: int) -> None:
    source = json_source({"type": "object", "properties": {"a": {"const": number}}})
    assert accepts(compile_source(source), f'{{"a": {number}}}')
