"""Schemas as clients of today send them: what is accepted is enforced, wherever it is asked for."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.e2e.grammars import CHAT, RANDOM
from tests.e2e.stack import Stack

LARGE = 2512292042121000001
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def _nested(schema: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        inner = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        schema = {"anyOf": [inner | {"additionalProperties": False}, {"type": "null"}]}
    return schema


ENFORCED: dict[str, dict[str, Any]] = {
    "pattern of a listed name": {
        "type": "object",
        "properties": {"score": DIGIT},
        "required": ["score"],
        "additionalProperties": False,
        "patternProperties": {"^score$": DIGIT},
    },
    "nine optional levels": _nested({"type": "integer", "minimum": 0, "maximum": 3}, 9),
    "names that are strings": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "string"},
        "maxProperties": 0,
    },
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "float64": {"type": "integer", "minimum": 0, "maximum": 1.7976931348623157e308},
    "a decimal exponent": {"type": "integer", "minimum": -1e21, "maximum": 1e21},
    "closed, with a name that is not listed": {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["b"],
        "patternProperties": {"^b$": {"type": "boolean"}},
    },
    "an unknown format": {"type": "string", "format": "colour", "maxLength": 5},
}


@pytest.mark.parametrize("name", ENFORCED)
@pytest.mark.parametrize("as_text", [False, True])
def test_answers_fit_the_schema(stack: Stack, name: str, as_text: bool) -> None:
    schema = ENFORCED[name]
    value = json.dumps(schema) if as_text else schema
    for seed in range(3):
        grammar = {"type": "json", "value": value}
        result = stack.generate(grammar=grammar, **RANDOM, seed=seed, max_new_tokens=120)
        assert result["details"]["finish_reason"] == "eos_token"
        _check(result["generated_text"], schema)
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
        _check(_answer(stack, response_format=wanted, seed=seed)["content"], schema)


@pytest.mark.parametrize("name", ENFORCED)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_fit_the_schema(stack: Stack, name: str, choice: str) -> None:
    schema = ENFORCED[name]
    tool = {"type": "function", "function": {"name": "f", "parameters": _arguments(schema)}}
    message = _answer(stack, tools=[tool], tool_choice=choice, seed=1)
    assert message.get("tool_calls") or choice == "auto"
    for call in message.get("tool_calls") or ():
        _check(json.dumps(json.loads(call["function"]["arguments"])["p"]), schema)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_number_keeps_its_digits(stack: Stack, as_text: bool) -> None:
    schema = {"enum": [LARGE]}
    value = json.dumps(schema) if as_text else schema
    grammar = {"type": "json", "value": value}
    assert stack.generate(grammar=grammar, max_new_tokens=30)["generated_text"] == str(LARGE)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    assert _answer(stack, response_format=wanted)["content"] == str(LARGE)


def test_a_number_that_would_be_rounded_in_a_tool_is_named(stack: Stack) -> None:
    parameters = _arguments({"enum": [LARGE]})
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    body = {**CHAT, "tools": tools, "tool_choice": "auto"}
    reply = stack.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 422
    place = "tools[0].function.parameters/properties/p/enum/0"
    assert f"the number {LARGE} cannot be enforced exactly, at {place}" in reply.json()["error"]


def test_a_number_in_a_tool_that_must_be_called_keeps_its_digits(stack: Stack) -> None:
    parameters = _arguments({"enum": [LARGE]})
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    (call,) = _answer(stack, tools=tools, tool_choice="required")["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"p": LARGE}


def test_what_a_tool_may_not_have_is_named_with_its_place(stack: Stack) -> None:
    inner = {"type": "array", "uniqueItems": True}
    refers = _arguments({"$ref": "#/$defs/a", "$defs": {"a": inner}})
    for parameters, place in ((_arguments(inner), "properties/p"), (refers, "$defs/a")):
        given = ({"type": "object"}, parameters)
        tools = [
            {"type": "function", "function": {"name": f"f{at}", "parameters": schema}}
            for at, schema in enumerate(given)
        ]
        reply = stack.http.post("/v1/chat/completions", json={**CHAT, "tools": tools})
        said = f'"uniqueItems" cannot be enforced, at tools[1].function.parameters/{place}'
        assert (reply.status_code, said in reply.json()["error"]) == (422, True), reply.text


def test_a_tool_may_refer_to_itself_by_its_identity(stack: Stack) -> None:
    parameters = _arguments({"$ref": "https://example.org/a#/$defs/d", "$defs": {"d": DIGIT}})
    parameters["$id"] = "https://example.org/a"
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for choice in ("auto", "required"):
        message = _answer(stack, tools=tools, tool_choice=choice)
        for call in message.get("tool_calls") or ():
            assert json.loads(call["function"]["arguments"])["p"] in range(10)


class TestDepth:
    """The same limit of 100 nested objects and lists, wherever a schema stands."""

    @pytest.mark.parametrize("as_text", [False, True])
    def test_of_grammars_and_formats(self, stack: Stack, as_text: bool) -> None:
        for depth, status in ((100, 200), (101, 422)):
            schema = _deep(depth)
            value = json.dumps(schema) if as_text else schema
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
            for path, body in (
                ("/generate", {"inputs": "a", "parameters": {"grammar": _json(value)}}),
                ("/v1/chat/completions", {**CHAT, "response_format": wanted}),
            ):
                reply = stack.http.post(path, json=body)
                assert reply.status_code == status, reply.text
                assert status == 200 or "nested more than 100 deep" in reply.json()["error"]

    @pytest.mark.parametrize("choice", ["auto", "required"])
    @pytest.mark.parametrize("is_given_twice", [False, True])
    def test_of_tools(self, stack: Stack, choice: str, is_given_twice: bool) -> None:
        for depth, status in ((100, 200), (101, 422)):
            function = {"name": "f", "parameters": _deep(depth)}
            tools = [{"type": "function", "function": function}]
            if is_given_twice:
                tools.append({"type": "function", "function": {**function, "name": "g"}})
            body = {**CHAT, "tools": tools, "tool_choice": choice}
            reply = stack.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == status, reply.text
            assert status == 200 or "nested more than 100 deep" in reply.json()["error"]


def test_a_tools_arguments_have_all_that_is_required_and_no_more(stack: Stack) -> None:
    parameters = {"type": "object", "properties": {"a": DIGIT}, "required": ["a", "b"]}
    parameters["properties"] = {"a": {"type": "object", "properties": {"x": DIGIT}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    message = _answer(stack, tools=tools, tool_choice="required", max_tokens=200, temperature=0.0)
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    assert arguments.keys() == {"a", "b"}
    assert arguments["a"].keys() <= {"x"}


def _deep(depth: int) -> dict[str, Any]:
    """A schema of so many nested objects and lists."""
    schema: dict[str, Any] = {"type": "object"} if depth % 2 else {"enum": [0]}
    for _ in range((depth - 1) // 2):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


def _json(value: Any) -> dict[str, Any]:
    return {"type": "json", "value": value}


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a tool with one argument, which fits a schema."""
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    parameters = {"type": "object", "properties": {"p": inner}, "required": ["p"]}
    return parameters | ({"$defs": schema["$defs"]} if "$defs" in schema else {})


def _answer(stack: Stack, **more: Any) -> dict[str, Any]:
    body = {**CHAT, "max_tokens": 160, "temperature": 9.0, **more}
    reply = stack.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    message: dict[str, Any] = reply.json()["choices"][0]["message"]
    return message


def _check(text: str, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
