"""Values are counted as a JSON parser would find them, without making them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.generation import json_values
from service.generation.json_values import count_values, most_values, nesting

TEXTS = st.text(st.sampled_from('a,"\\{}[]:é\n'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=25,
)


def counted(value: Any) -> int:
    """The values of a tree; an empty list or object counts as two."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(sum(map(counted, value)), 1)
    return 1


@given(VALUES, st.booleans())
def test_the_count_is_that_of_the_tree(value: Any, escapes: bool) -> None:
    assert count_values(json.dumps(value, ensure_ascii=escapes).encode()) == counted(value)


def depth(value: Any) -> int:
    """How many lists and objects lie in each other."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(VALUES)
def test_the_nesting_is_that_of_the_tree(value: Any) -> None:
    assert nesting(json.dumps(value).encode()) == depth(value)


@given(st.binary(max_size=200))
def test_any_bytes_can_be_counted(data: bytes) -> None:
    assert count_values(data) >= 1
    assert nesting(data) >= 0
    most_values(data)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"a": 1, "b": [1, 2, 3], "c": 2}', "b"),
        ('{"a,]": [1], "b": {"x": 1, "y": {"z": [1, 2, 3]}}}', "b"),
        ("[1, 2, 3]", None),
        ("1", None),
        ('{"a\\"b": [1, 2, 3, 4], "c": [1]}', "ab"),
    ],
)
def test_the_member_with_most_values_is_named(text: str, name: str | None) -> None:
    assert most_values(text.encode()) == name


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_slices_are_the_text_with_blanks_for_escaped_quotes_and_backslashes(
    head: bytes, tail: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_SLICE", 3)
        data = head + b'\\\\\\"' + tail
        blank = data.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        assert b"".join(json_values.slices(data)) == blank
        assert json_values.count_bytes(data, b',"') == data.count(b",") + data.count(b'"')


@given(VALUES, st.booleans())
def test_slices_change_no_count(value: Any, escapes: bool) -> None:
    text = json.dumps(value, ensure_ascii=escapes).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_SLICE", 2)
        assert count_values(text) == counted(value)
        assert nesting(text) == depth(value)
