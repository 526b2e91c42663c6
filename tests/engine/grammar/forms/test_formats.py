"""Texts of a format, as they stand without quotation marks, fit it."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.grammar.backend_llguidance import json_source
from engine.grammar.forms.formats import PLAIN_FORMATS
from engine.grammar.rule_source import rule_source
from engine.grammar.schema.strings import FORMATS
from tests.engine.grammar.grammars import accepts, compile_source

USUAL = {
    "date": "2026-11-29",
    "time": "12:30:00Z",
    "date-time": "2026-11-29T23:59:59.5+01:00",
    "duration": "P3D",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "ipv4": "192.168.0.1",
    "ipv6": "2001:db8:0:0:0:0:0:1",
    "hostname": "www.example.com",
    "email": "jane.doe@example.com",
    "uri": "https://example.com:8080/a/b?c=d&e=f",
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_usual_texts_can_be_written_and_others_not(name: str) -> None:
    schema = {"type": "string", "format": name}
    source = rule_source([{"until": "\n!", "before": {"string": schema}}], json_source)
    assert accepts(compile_source(source), USUAL[name] + "\n!")
    assert not accepts(compile_source(source), "!" + USUAL[name] + "\n!")


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(data=st.data())
def test_each_text_is_of_the_format_in_json_too(name: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(PLAIN_FORMATS[name], fullmatch=True))
    schema = {"type": "string", "format": name}
    assert accepts(compile_source(json_source(schema)), f'"{text}"'), text
    if name == "date" and not text.startswith("0000"):
        datetime.date.fromisoformat(text)
