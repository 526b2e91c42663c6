"""Arguments in forms that have them one by one: what may be written, and what is read of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from engine.grammar.backend_llguidance import json_source
from engine.grammar.rule_source import rule_source
from service.errors import ServiceError
from service.openai.call_formats.dialect import Dialect
from service.openai.call_formats.pieces import Parsed
from service.openai.tools import Tool, Toolbox
from tests.engine.grammar.grammars import takes
from tests.service.openai.call_formats.test_dialect import TEMPLATES, dialect

POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
PROPERTIES: dict[str, Any] = {
    "text": {"type": "string", "description": "Any text."},
    "kind": {"enum": ["a", "b c", 3, None]},
    "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
    "short": {"type": "string", "minLength": 2, "maxLength": 4},
    "day": {"type": "string", "format": "date"},
    "count": {"type": "integer", "minimum": 0, "maximum": 20},
    "on": {"type": "boolean"},
    "at": {"$ref": "#/$defs/point"},
    "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 10}]},
    "until": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    "brief": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
    "word": {"anyOf": [{"enum": ["any", "x"]}, {"type": "integer"}]},
    "any": {},
}
# Values as they are written, with what is read; None where the grammar does not allow them.
VALUES: list[tuple[str, str, Any]] = [
    ("text", "Paris, 5\n\n<b>", "Paris, 5\n\n<b>"),
    ("text", "", ""),
    ("text", "12", "12"),
    ("kind", "b c", "b c"),
    ("kind", "3", 3),
    ("kind", "null", None),
    ("code", "XY", "XY"),
    ("short", "12", "12"),
    ("day", "2026-11-29", "2026-11-29"),
    ("count", "12", 12),
    ("on", "true", True),
    ("at", '{"x": 1.5}', {"x": 1.5}),
    ("points", '[{"x": 1}, {"x": 2}]', [{"x": 1}, {"x": 2}]),
    ("maybe", "null", None),
    ("maybe", "nothing", "nothing"),
    ("either", "3", "3"),
    ("any", '{"a": [1]}', {"a": [1]}),
    ("any", "so", "so"),
    ("until", "2026-11-29", "2026-11-29"),
    ("until", "null", None),
    ("brief", "hello", "hello"),
    ("brief", "null", None),
    ("word", "any", "any"),
    ("word", "12", 12),
]
WRONG = [
    ("kind", "c"), ("code", "XYZ"), ("short", "x"), ("day", "2026-02-30"), ("count", "21"),
    ("until", "soon"), ("brief", "longer"), ("word", "other"), ("on", "True"),
    ("at", '{"y": 1}'), ("points", "{}"),
]  # fmt: skip
WRITTEN = {
    "qwen3_coder": (
        "<tool_call>\n<function=f>\n",
        "<parameter={}>\n{}\n</parameter>\n",
        "</function>\n</tool_call>",
    ),
    "glm4": (
        "<tool_call>f\n",
        "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n",
        "</tool_call>",
    ),
}
FORMS = list(WRITTEN)


def tool(name: str) -> Tool:
    schema = {"type": "object", "properties": {name: PROPERTIES[name]}, "$defs": {"point": POINT}}
    return Tool(name="f", parameters=schema)


def written(form: str, *pairs: tuple[str, str]) -> str:
    begin, pair, end = WRITTEN[form]
    return begin + "".join(pair.format(*some) for some in pairs) + end


def allows(form: Dialect, text: str, toolbox: Toolbox) -> bool:
    grammar = form.call_grammar(toolbox)
    return takes(rule_source(grammar.value, json_source), text)


def arguments(form: Dialect, text: str, given: Tool) -> Any:
    reader = form.reader((given,))
    assert reader is not None
    parsed = Parsed.of([*reader.push(text), *reader.finish(is_cut=False)])
    assert parsed.is_call
    return json.loads(parsed.calls[0].arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "value", "read"), VALUES)
def test_what_may_be_written_is_read_as_a_value_that_fits(
    form: str, name: str, value: str, read: Any
) -> None:
    native, text = dialect(TEMPLATES[form]), written(form, (name, value))
    assert allows(native, text, Toolbox(tools=(tool(name),), may_answer=False))
    found = arguments(native, text, tool(name))
    assert found == {name: read}
    assert Draft202012Validator(tool(name).parameters).is_valid(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_does_not_fit_cannot_be_written(form: str, name: str, value: str) -> None:
    toolbox = Toolbox(tools=(tool(name),), may_answer=False)
    assert not allows(dialect(TEMPLATES[form]), written(form, (name, value)), toolbox)


@pytest.mark.parametrize("form", FORMS)
def test_required_arguments_must_come_and_others_may(form: str) -> None:
    schema = {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["b"]}
    toolbox = Toolbox(tools=(Tool(name="f", parameters=schema),), may_answer=False)
    native = dialect(TEMPLATES[form])
    assert allows(native, written(form, ("a", "x"), ("b", "y")), toolbox)
    assert allows(native, written(form, ("b", "y")), toolbox)
    assert not allows(native, written(form, ("a", "x")), toolbox)
    assert not allows(native, written(form, ("b", "y"), ("c", "z")), toolbox)


@pytest.mark.parametrize("form", [*FORMS, "kimi_k2", "granite", "hermes"])
def test_several_calls_come_only_where_they_are_wanted(form: str) -> None:
    from tests.service.openai.call_formats.test_dialect import CALLS, WEATHER

    native = dialect(TEMPLATES[form])
    call = CALLS[form]
    several = {
        "granite": call[:-1] + ", " + call.removeprefix("<|tool_call|>[")
        if form == "granite"
        else "",
        "kimi_k2": call.replace("<|tool_call_end|>", "<|tool_call_end|>" + _second(call), 1),
    }.get(form, f"{call}\n{call}")
    for many in (True, False):
        toolbox = Toolbox(tools=(WEATHER,), may_answer=False, many=many)
        assert allows(native, call, toolbox)
        assert allows(native, several, toolbox) == many
    reader = native.reader((WEATHER,))
    assert reader is not None
    parsed = Parsed.of([*reader.push(several), *reader.finish(is_cut=False)])
    assert [call.arguments for call in parsed.calls] == ['{"city": "Paris"}'] * 2


def _second(call: str) -> str:
    """The second of two calls of Kimi's."""
    inner = call.removeprefix("<|tool_calls_section_begin|>").removesuffix(
        "<|tool_calls_section_end|>"
    )
    return inner.replace(":0", ":1")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"properties": {"a": {"type": "string", "not": {"const": "x"}}}},
        {"properties": {"a<b": {"type": "string"}}},
        {"patternProperties": {"^a": {}}},
        {
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}},
        },
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_said_of_arguments_one_by_one_is_refused(form: str, schema: Any) -> None:
    toolbox = Toolbox(tools=(Tool(name="f", parameters=schema),), may_answer=True)
    with pytest.raises(
        ServiceError, match=r"cannot be enforced|must not have names|has more than 64"
    ):
        dialect(TEMPLATES[form]).call_grammar(toolbox)
