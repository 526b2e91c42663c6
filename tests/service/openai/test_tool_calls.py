"""Tool calls in a whole text, and in a text that comes in pieces of any size."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.openai.call_formats.pieces import Parsed
from service.openai.call_formats.tokenwire import EnvelopeReader
from service.openai.tool_calls import CallReader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text().filter(lambda key: key != "_name"), JSON, max_size=4)


def envelope(name: str, arguments: dict[str, Any], **style: Any) -> str:
    return json.dumps({"function": {"_name": name, **arguments}}, **style)


def parsed(text: str) -> Parsed:
    reader = EnvelopeReader()
    return Parsed.of([*reader.push(text), *reader.finish(is_cut=False)])


@given(
    st.text(), ARGUMENTS, st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 2}]),
    st.booleans(), st.lists(st.integers(1, 200), max_size=20),
)  # fmt: skip
def test_pieces_of_a_call_give_its_name_and_its_arguments(
    name: str, arguments: dict[str, Any], style: dict[str, Any], ascii_only: bool, cuts: list[int]
) -> None:
    text = envelope(name, arguments, ensure_ascii=ascii_only, **style)
    edges = [0, *sorted(cut for cut in set(cuts) if cut < len(text)), len(text)]
    reader = CallReader()
    deltas = [
        delta for start, end in itertools.pairwise(edges) for delta in reader.push(text[start:end])
    ]
    assert reader.is_complete
    assert [delta.name for delta in deltas if delta.name is not None] == [name]
    assert deltas[0].name == name
    assert json.loads("".join(delta.arguments for delta in deltas)) == arguments
    (call,) = parsed(text).calls
    assert (call.name, json.loads(call.arguments)) == (name, arguments)


@given(st.text())
def test_other_texts_are_no_calls(text: str) -> None:
    assert parsed(text).calls == ()
    assert parsed(text).content == text


@given(st.text(min_size=1), ARGUMENTS, st.data())
def test_a_call_that_is_cut_off_is_not_complete(
    name: str, arguments: dict[str, Any], data: st.DataObject
) -> None:
    text = envelope(name, arguments)
    cut = data.draw(st.integers(0, len(text) - 3))  # before the brace that ends the arguments
    assert not parsed(text[:cut]).is_call


@pytest.mark.parametrize("text", ['{"a": 1}', "{", '{"function": {"x": 1}}', '{"function": 5}'])
def test_other_json_is_no_call(text: str) -> None:
    assert parsed(text).calls == ()
    assert parsed(text).content == text
