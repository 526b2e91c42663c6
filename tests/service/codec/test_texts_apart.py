"""Long texts of a body are read apart, and what comes of it is what comes of the whole body."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import bodies, strict_json, texts_apart
from service.codec.strict_json import parse
from service.errors import ServiceError

# Each of these characters is written in another way, and some as two escapes.
TEXTS = st.text(st.sampled_from('a"\\/\n\x7fé€😀\ud7ff'), max_size=60)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every body is large, every text long, and a part has three escapes."""
    monkeypatch.setattr(strict_json, "_LARGE_BYTES", 0)
    monkeypatch.setattr(texts_apart, "_LONG", 1)
    monkeypatch.setattr(texts_apart, "_PART", 18)


@given(VALUES, st.booleans())
def test_any_value_is_read_as_python_reads_it(value: Any, ascii_only: bool) -> None:
    data = json.dumps({"x": value}, ensure_ascii=ascii_only).encode()
    assert parse(data, dict[str, Any]) == {"x": value}


def test_a_long_text_is_not_in_the_rest() -> None:
    rest, texts = texts_apart.cut(b'{"name of a member": ["a text", "\\u00e9"], "a": 1}')
    assert set(texts.values()) == {"a text", "é"}
    assert json.loads(rest) == {"name of a member": list(texts), "a": 1}


def test_texts_are_found_in_typed_values() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one text"}]}]
    body = {"messages": messages, "tools": [], "stop": ["another text"], "logit_bias": {"5": 1}}
    whole = msgspec.convert(body, bodies.Chat, strict=False)
    assert parse(json.dumps(body).encode(), bodies.Chat) == whole


def test_a_mark_cannot_be_guessed() -> None:
    _, texts = texts_apart.cut(b'["a text"]')
    (mark,) = texts
    assert parse(json.dumps(["a text", mark]).encode(), list[str]) == ["a text", mark]


@pytest.mark.parametrize(
    "data",
    [
        b'{"inputs": "a\\ud800 half"}',
        b'{"inputs": "half \\ude00 and more of the text"}',
        b'{"inputs": "aaaaaaaaaaaaaaaa\\q and more of the text"}',
        b'{"inputs": "aaaaaaaaaaaaaaaaa\xff and more of the text"}',
        b'{"inputs": "aaaaaaaaaaaaaaaaa\xe2\x82 and more of the text"}',
        b'{"inputs": "' + b"\x80" * 60 + b'"}',
        b'{"inputs": "a text that has no end}',
        b'{"inputs": "a text\\"}',
        b'{"inputs": \\"a text\\"}',
        b'{"inputs": "a\ntext"}',
        b'{"inputs": "one text", "inputs": "another text"}',
        b'{"inputs": "one text", "parameters": {"seed": "a text"}}',
        b'{"inputs": ["one text"]}',
        b'{"inputs": "one text", "parameters": {"grammar": {"type": "a kind", "value": 1}}}',
    ],
)
def test_the_error_is_that_of_the_whole_body(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError) as apart:
        parse(data, bodies.Generate)
    monkeypatch.setattr(strict_json, "_LARGE_BYTES", len(data))
    with pytest.raises(ServiceError) as whole:
        parse(data, bodies.Generate)
    assert (apart.value.kind, apart.value.message) == (whole.value.kind, whole.value.message)


@pytest.mark.parametrize(
    "others",
    [
        '"parameters": {"seed": "a text"}',
        '"parameters": {"grammar": {"type": "a kind", "value": 1}}',
        '"parameters": {"seed": 1, "seed": 2}',
        f'"other": {"[" * 200}{"]" * 200}',
        '"other": 1e999',
    ],
)
def test_what_is_wrong_beside_long_texts_is_found_without_them(
    others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the calls that read all of a body holds the interpreter's lock for milliseconds."""
    data = f'{{"inputs": "{"escape " * 100}", {others}}}'.replace("escape", "\\n").encode()
    read: list[bytes] = []
    check = strict_json._check_syntax
    monkeypatch.setattr(strict_json, "_check_syntax", lambda part: read.append(part) or check(part))
    with pytest.raises(ServiceError):
        parse(data, bodies.Generate)
    assert 0 < max(map(len, read)) < len(data) - 200


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused_as_a_whole(data: bytes) -> None:
    body = b'["' + data + b'"]'
    try:
        rest, texts = texts_apart.cut(body)
        value = texts_apart.restored(msgspec.json.decode(rest), texts)
    except ValueError:
        return
    assert msgspec.json.decode(body) == value
