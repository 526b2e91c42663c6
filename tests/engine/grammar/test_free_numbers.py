"""A number that a schema leaves open has an end to its digits, wherever it stands."""

from __future__ import annotations

import json
import math
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar import backend_outlines
from engine.grammar.backend_llguidance import json_source
from engine.grammar.matcher import Matcher
from engine.grammar.rule_source import rule_source
from engine.grammar.schema.numbers import FREE_NUMBER
from engine.protocol.errors import GrammarError
from service.openai.tools import Tool, Toolbox
from tests.engine.grammar.grammars import accepts, allowed, compile_source, encode

Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
LONGEST = 60  # characters of a number; FREE_NUMBER has 48 at most
ENDLESS = ("1" * LONGEST, "0." + "3" * LONGEST, "1e" + "1" * LONGEST, "-" + "7" * LONGEST)
TOOL = Tool(name="f", parameters={"type": "object", "properties": {"x": NUMBER, "y": {}}})

# Schemas with the text before a number that they leave open.
OPEN: dict[str, tuple[Schema, str]] = {
    "a number": (NUMBER, ""),
    "anything": ({}, ""),
    "an item of anything": ({}, '[{"a": ['),
    "a type of several": ({"type": ["string", "number", "null"]}, ""),
    "a choice": ({"anyOf": [{"type": "null"}, NUMBER]}, ""),
    "a choice of one": ({"oneOf": [{"type": "string"}, NUMBER]}, ""),
    "an item": ({"type": "array", "items": NUMBER}, "[1, "),
    "an item of no type": ({"type": "array"}, "["),
    "an item behind others": ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null, "),
    "a property": ({"type": "object", "properties": {"a": NUMBER}}, '{"a": '),
    "a property of an open object": ({"type": "object"}, '{"a": '),
    "a property of any name": ({"type": "object", "additionalProperties": NUMBER}, '{"a": '),
    "a required name": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]},
        '{"b": ',
    ),
    "a pattern's property": (
        {"type": "object", "patternProperties": {"^a": NUMBER}, "additionalProperties": False},
        '{"ab": ',
    ),
    "a reference": ({"$ref": "#/$defs/n", "$defs": {"n": NUMBER}}, ""),
    "parts": ({"allOf": [NUMBER, {"minimum": 0}]}, ""),
    "integers in parts": ({"allOf": [{"type": "integer"}, {"minimum": 0}]}, ""),
    "multiples": ({"type": "number", "multipleOf": 0.5}, ""),
    "a bound": ({"type": "number", "minimum": 0}, ""),
    "an integer": ({"type": "integer"}, ""),
    "what is not a string": ({"not": {"type": "string"}}, ""),
    "what contains a number": ({"type": "array", "contains": NUMBER}, "["),
    "beside a pattern without forms": (
        {
            "type": "object",
            "properties": {"n": NUMBER, "s": {"type": "string", "pattern": r"^\p{L}$"}},
        },
        '{"n": ',
    ),
}


def takes(source: str, text: str) -> bool:
    """Whether a text may begin so."""
    matcher = compile_source(source)
    try:
        matcher.advance(encode(text))
    except GrammarError:
        return False
    return True


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("or_text", [False, True])
def test_digits_have_an_end(name: str, or_text: bool) -> None:
    schema, before = OPEN[name]
    source = json_source(schema, or_text=or_text and before.startswith("{"))
    assert takes(source, before + "12")
    for endless in ENDLESS:
        assert not takes(source, before + endless)


@pytest.mark.parametrize("name", ["a number", "an item", "a property"])
def test_digits_have_an_end_with_outlines(name: str) -> None:
    schema, before = OPEN[name]
    source = backend_outlines.json_source(schema)
    for endless in ENDLESS:
        assert not takes(source, before + endless)


def test_arguments_of_tools_have_an_end() -> None:
    envelope = json_source(Toolbox(tools=(TOOL,), may_answer=False).schema())
    call = {"choice": [["<call>", {"schema": TOOL.parameters, "of": "f"}]]}
    for source, head in (
        (envelope, '{"function": {"_name": "f", '),
        (rule_source(call, json_source), "<call>{"),
    ):
        for name in "xy":
            assert takes(source, f'{head}"{name}": 1.5e-7')
            assert not takes(source, f'{head}"{name}": {"1" * LONGEST}')


@pytest.mark.parametrize(
    "text",
    ["0", "-0.5", "1e30", "1.5e-7", "-12.5E+3", "6.02214076e+23", "1e-320", "1.7e307", "9" * 20],
)
def test_values_that_float64_tells_apart_can_be_written(text: str) -> None:
    for schema, before, after in ((NUMBER, "", ""), ({}, "", ""), ({}, '{"a": [', "]}")):
        assert accepts(compile_source(json_source(schema)), before + text + after)


@given(st.from_regex(FREE_NUMBER, fullmatch=True))
def test_what_may_be_written_is_a_finite_number_of_bounded_length(text: str) -> None:
    assert len(text) <= LONGEST
    assert math.isfinite(json.loads(text))


@given(st.floats(-9.9e307, 9.9e307))
def test_every_float_may_be_written_as_usual(number: float) -> None:
    assert re.fullmatch(FREE_NUMBER, json.dumps(number))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["a number", "a type of several", "parts", "multiples"]), st.integers(0))
def test_whatever_digits_are_chosen_a_number_ends(name: str, seed: int) -> None:
    matcher, text = compile_source(json_source(OPEN[name][0])), b""
    rng = Random(seed)
    while digits := _allowed_digits(matcher):
        digit = rng.choice(digits)
        matcher.advance(encode(digit))
        text += digit.encode()
        assert len(text) <= LONGEST
    assert math.isfinite(json.loads(text))


def _allowed_digits(matcher: Matcher) -> list[str]:
    """The characters of numbers that may come next, one token each."""
    following = allowed(matcher)
    return [char for char in "0123456789.eE+-" if set(encode(char)) <= following]
