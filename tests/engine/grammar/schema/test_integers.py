"""Integers as regular expressions, against every integer nearby."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.grammar.schema import exact_integers
from engine.grammar.schema.integers import integer_regex


@given(st.integers(-1200, 1200), st.integers(0, 1200))
def test_a_range_has_its_integers_and_no_others(low: int, span: int) -> None:
    pattern = re.compile(integer_regex(low, low + span))
    for number in range(low - 150, low + span + 150):
        assert bool(pattern.fullmatch(str(number))) == (low <= number <= low + span)
    for text in ("", "-", "-0", "00", "+1", f"0{low + span}", f"{low}."):
        assert not pattern.fullmatch(text)


@given(st.integers(), st.integers(0), st.integers())
def test_ranges_may_have_any_size(low: int, span: int, offset: int) -> None:
    pattern = re.compile(integer_regex(low, low + span))
    for number in (low, low + span, low + span // 2, low - 1, low + span + 1, low + offset):
        assert bool(pattern.fullmatch(str(number))) == (low <= number <= low + span)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "integer", "maximum": 2**53},
        {"type": "number", "maximum": 2**53 + 1},
        {"enum": [1, 2]},
        {"enum": [2**53 + 1, "a"]},
        {"type": "integer", "minimum": 2**64, "multipleOf": 2},
    ],
)
def test_only_integers_that_others_would_round_are_written_so(schema: dict[str, object]) -> None:
    assert exact_integers(schema) is None


def test_a_side_without_a_bound_has_an_end() -> None:
    pattern = re.compile(exact_integers({"type": "integer", "minimum": 2**70}) or "")
    assert pattern.fullmatch(str(2**70))
    assert not pattern.fullmatch(str(2**70 - 1))
    assert not pattern.fullmatch(str(2**100))
