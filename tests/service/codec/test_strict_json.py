"""A body is read as JSON is defined, and the first thing that is wrong with it is named."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import bodies
from service.codec.strict_json import MAX_DEPTH, parse
from service.errors import ErrorKind, ServiceError

LISTS = "[" * MAX_DEPTH + "]" * MAX_DEPTH
OBJECTS = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH


def kind_of(text: str) -> ErrorKind:
    """What is no JSON is a kind of its own; a name that stands twice has TGI's."""
    return ErrorKind.SHAPE if "duplicate field" in text else ErrorKind.JSON


def refused(data: bytes | str, kind: type[Any] = bodies.Generate) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        parse(data if isinstance(data, bytes) else data.encode(), kind)
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"   ",
        b'{"inputs": "a"',
        b"{'inputs': 'a'}",
        b'{inputs: "a"}',
        b'{"inputs": "a",}',
        b'{"inputs": "a"} x',
        b'{"inputs": "a"}{}',
        b'{"inputs": "a\nb"}',
        b'{"inputs": "a\x00"}',
        b'{"inputs": "\xff"}',
        b'{"inputs": "\xed\xa0\x80"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\\ud800 and more"}',
        b'\xef\xbb\xbf{"inputs": "a"}',
        b'{"inputs": "a", "x": NaN}',
        b'{"inputs": "a", "x": -Infinity}',
        b'{"inputs": "a", "x": 1e999}',
        b'{"inputs": "a", "parameters": {"temperature": 1e999}}',
        b'{"inputs": "a", "x": 01}',
        b'{"inputs": "a", "x": .5}',
        b'{"inputs": "a", "x": 1.}',
        b'{"inputs": "a", "x": [1,]}',
        b'{"inputs": "a" /* why */}',
        b'{"inputs": "a", "x": True}',
        '{"inputs": "a"}'.encode("utf-16"),
        b'{"inputs": "a", "x": ' + b"[" * 100_000,
        b'{"inputs": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_json_is_refused_as_such(data: bytes) -> None:
    error = refused(data)
    assert (error.kind, error.kind.http_status) == (ErrorKind.JSON, 400)
    assert error.message.startswith("Failed to parse the request body as JSON: ")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("null", "expected an object, got null"),
        ("[]", "expected an object, got a list"),
        ("{}", "missing field `inputs`"),
        ('{"inputs": null}', "inputs: expected a string, got null"),
        ('{"inputs": 1}', "inputs: expected a string, got an integer"),
        ('{"inputs": "a", "parameters": null}', "parameters: expected an object, got null"),
        ('{"inputs": "a", "parameters": []}', "parameters: expected an object, got a list"),
    ],
)
def test_another_shape_is_named(body: str, text: str) -> None:
    error = refused(body)
    assert (error.kind, error.reason) == (ErrorKind.SHAPE, text)
    assert error.message == f"Failed to deserialize the JSON body into the target type: {text}"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ('{"stop": "a"}', "stop: expected a list, got a string"),
        ('{"stop": null}', "stop: expected a list, got null"),
        ('{"stop": ["a", 1]}', "stop[1]: expected a string, got an integer"),
        ('{"stop": [["Deep"]]}', "stop[0]: expected a string, got a list"),
        ('{"do_sample": "yes"}', "do_sample: expected a boolean, got a string"),
        ('{"do_sample": null}', "do_sample: expected a boolean, got null"),
        ('{"details": 1}', "details: expected a boolean, got an integer"),
        ('{"top_k": 10.0}', "top_k: expected an integer, got a number"),
        ('{"top_k": true}', "top_k: expected an integer, got a boolean"),
        ('{"top_k": "10"}', "top_k: expected an integer, got a string"),
        ('{"max_new_tokens": -1}', "max_new_tokens: expected an integer >= 0"),
        ('{"max_new_tokens": 4294967296}', "max_new_tokens: expected an integer <= 4294967295"),
        ('{"temperature": "hot"}', "temperature: expected a number, got a string"),
        ('{"grammar": {"value": {}}}', "grammar: missing field `type`"),
        ('{"grammar": {"type": "json"}}', "grammar: missing field `value`"),
        ('{"grammar": {"type": "xml", "value": ""}}', "grammar.type: unknown variant `xml`"),
    ],
)
def test_a_wrong_type_is_named_with_its_path(parameters: str, text: str) -> None:
    error = refused(f'{{"inputs": "a", "parameters": {parameters}}}')
    assert (error.kind, error.reason) == (ErrorKind.SHAPE, f"parameters.{text}")
    assert (error.field or "").startswith(f"parameters.{text.partition(':')[0]}")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"inputs": 1, "parameters": {"top_k": "x"}}', "inputs: expected a string"),
        ('{"parameters": {"top_k": "x"}, "inputs": 1}', "parameters.top_k: expected an integer"),
        ('{"parameters": {"seed": 1e2, "top_k": "x"}}', "parameters.seed: expected an integer"),
        (
            f'{{"parameters": {{"seed": {2**64}, "top_k": "x"}}}}',
            f"parameters.seed: expected an integer <= {2**64 - 1}",
        ),
        ('{"parameters": {"top_k": "x", "seed": -1}}', "parameters.top_k: expected an integer"),
    ],
)
def test_of_several_wrong_types_the_first_is_named(body: str, text: str) -> None:
    error = refused(body)
    assert (error.kind, error.reason.startswith(text)) == (ErrorKind.SHAPE, True)


def test_an_empty_list_of_prompts_is_named_before_what_follows() -> None:
    error = refused('{"prompt": [], "max_tokens": "x"}', bodies.Completions)
    assert error.reason.startswith("prompt: Empty array detected.")
    assert error.field == "prompt"


WRONG = '"inputs": 1, "parameters": {"seed": "x"}'
NO_JSON = {
    '"x": NaN': "invalid character (byte 48)",
    '"x": 01': "invalid number (byte 49)",
    '"x": "\n"': "invalid character (byte 49)",
    '"x": "\\ud800"': "half a surrogate pair (byte 55)",
    '"x": 1e999': "x: number out of range",
    '"x": {"y": [1, -1e999]}': "x.y[1]: number out of range",
    '"x": 1, "x": 2': "duplicate field `x`",
    '"inputs": 2': "duplicate field `inputs`",
    '"x": {"y": 1, "y": 2}': "x: duplicate field `y`",
    f'"x": {LISTS}': "it is nested more than 128 deep",
    f'"x": {OBJECTS}': "it is nested more than 128 deep",
    '"x": ' + "[" * 100_000: "it is nested more than 128 deep",
}


@pytest.mark.parametrize("kind", [bodies.Generate, bodies.CompatGenerate, bodies.Invocation])
@pytest.mark.parametrize(("fault", "text"), NO_JSON.items(), ids=range(len(NO_JSON)))
def test_what_is_no_json_is_named_before_any_wrong_type(
    fault: str, text: str, kind: type[Any]
) -> None:
    error = refused(f"{{{WRONG}, {fault}}}", kind)
    assert (error.kind, error.reason) == (kind_of(text), text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"inputs": 1, "x": "\xff"}', "invalid UTF-8 (byte 20)"),
        (b'{"inputs": 1, "\xff": 1}', "invalid UTF-8 (byte 15)"),
        (b'{"x": "\xff", "y": NaN}', "invalid UTF-8 (byte 7)"),
        (b'{"x": NaN, "y": "\xff"}', "invalid character (byte 6)"),
        (b'{"inputs": 1} \xff', "invalid UTF-8 (byte 14)"),
        (b'{"inputs": 1', "Input data was truncated"),
        (b'{"inputs": 1} x', "trailing characters (byte 15)"),
        (b"1 1", "trailing characters (byte 3)"),
    ],
)
def test_also_what_is_no_text_or_is_cut(body: bytes, text: str) -> None:
    error = refused(body)
    assert (error.kind, error.reason) == (kind_of(text), text)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"x": 1, "x": 2, "y": 1e999}', "duplicate field `x`"),
        ('{"y": 1e999, "x": 1, "x": 2}', "y: number out of range"),
        (f'{{"x": 1, "x": {LISTS}}}', "duplicate field `x`"),
        (f'{{"x": {LISTS}, "x": 1}}', "it is nested more than 128 deep"),
        ('{"x": 1, "x": 2, "y": NaN}', "invalid character (byte 22)"),
    ],
)
def test_of_what_may_not_be_there_the_first_is_named_unless_the_text_cannot_be_read(
    body: str, text: str
) -> None:
    error = refused(body)
    assert (error.kind, error.reason) == (kind_of(text), text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\ud800", "half a surrogate pair (byte 18)"),
        ("\\ud800\\n", "half a surrogate pair (byte 18)"),
        ("\\udfff", "half a surrogate pair (byte 18)"),
        ("ab\\udbff", "half a surrogate pair (byte 20)"),
        ("\\ud800\\ud800", "half a surrogate pair (byte 24)"),
        ("\\ud8", "invalid character in unicode escape (byte 17)"),
    ],
)
def test_half_a_surrogate_pair_is_named_wherever_it_stands(text: str, reason: str) -> None:
    error = refused(f'{{"inputs": "{text}"}}')
    assert (error.kind, error.reason) == (ErrorKind.JSON, reason)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ('{"inputs": "a", "inputs": "a"}', ""),
        ('{"inputs": "a", "\\u0069nputs": "b"}', ""),
        ('{"inputs": "a", "parameters": {"inputs": 1, "inputs": 2}}', "parameters: "),
        ('{"inputs": "a", "unknown": [0, {"inputs": 1, "inputs": 2}]}', "unknown[1]: "),
    ],
)
def test_two_members_of_the_same_name_are_refused_at_any_depth(body: str, path: str) -> None:
    error = refused(body)
    assert (error.kind, error.reason) == (ErrorKind.SHAPE, f"{path}duplicate field `inputs`")


@pytest.mark.parametrize("depth", [128, 500, 100_000])
def test_too_deep_comes_before_a_name_that_is_there_twice(depth: int) -> None:
    error = refused('{"a":' * depth + '{"x": 1, "x": 2}' + "}" * depth, Any)
    assert error.kind is ErrorKind.JSON


def test_bad_utf8_is_named_with_its_place_in_the_body() -> None:
    assert refused(b'{"inputs": "ab\xff"}').reason == "invalid UTF-8 (byte 14)"


def test_an_ignored_integer_may_be_of_any_length() -> None:
    body = f'{{"inputs": "a", "x": 1{"0" * 10_000}}}'
    assert parse(body.encode(), bodies.Generate).inputs == "a"


@pytest.mark.parametrize("nested", [LISTS, OBJECTS])
def test_as_deep_as_the_limit_is_taken_and_one_more_is_not(nested: str) -> None:
    assert parse(nested.encode(), Any)
    error = refused(f"[{nested}]", Any)
    assert (error.kind, error.reason) == (ErrorKind.JSON, "it is nested more than 128 deep")


def test_brackets_in_texts_do_not_count() -> None:
    text = "[{" * 1000
    assert parse(json.dumps({"inputs": text}).encode(), bodies.Generate).inputs == text


def test_numbers_stay_what_they_are() -> None:
    value = [2512292042121000001, -(2**70), 2**64 - 1, 0.1, 1.0, 10**30]
    read = parse(json.dumps(value).encode(), Any)
    assert read == value
    assert [type(item) for item in read] == [type(item) for item in value]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(_JSON, st.booleans())
def test_any_value_is_read_as_python_reads_it(value: Any, ascii_only: bool) -> None:
    """Keys in their order, texts with every character, numbers exact."""
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert json.dumps(parse(data, Any)) == json.dumps(json.loads(data))


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(ServiceError):
        parse(data, bodies.Chat)
