"""Tools: which are in force, and the grammar and the prompt that they become."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from service.errors import ErrorKind, ServiceError
from service.openai.tools import DEFAULT_TOOL_PROMPT, Tool, Toolbox

WEATHER = Tool(
    name="get_weather",
    description="Weather in a city",
    parameters={
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}, "location": {"type": "string"}},
        "required": ["location"],
    },
)
TIME = Tool(name="get_time")


def refusal(*tools: Tool, choice: Any = None) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        toolbox = Toolbox.choose(tools, choice)
        assert toolbox is not None
        toolbox.schema()
    return refused.value


@pytest.mark.parametrize("choice", [None, "auto"])
def test_by_default_a_tool_may_be_called(choice: Any) -> None:
    assert Toolbox.choose([WEATHER, TIME], choice) == Toolbox(
        tools=(WEATHER, TIME), may_answer=True
    )


def test_a_call_can_be_required() -> None:
    assert Toolbox.choose([WEATHER], "required") == Toolbox(tools=(WEATHER,), may_answer=False)


@pytest.mark.parametrize(
    "choice",
    ["get_time", {"function": {"name": "get_time"}},
     {"type": "function", "function": {"name": "get_time"}}],
)  # fmt: skip
def test_one_tool_can_be_named(choice: Any) -> None:
    expected = Toolbox(tools=(TIME,), may_answer=False, many=False)
    assert Toolbox.choose([WEATHER, TIME], choice) == expected


@pytest.mark.parametrize("choice", [None, "auto", "required"])
def test_several_calls_can_be_forbidden(choice: Any) -> None:
    for many in (True, False):
        toolbox = Toolbox.choose([WEATHER, TIME], choice, many=many)
        assert toolbox is not None
        assert toolbox.many is many


@pytest.mark.parametrize("tools", [(), (WEATHER,)])
def test_none_means_no_tools(tools: tuple[Tool, ...]) -> None:
    assert Toolbox.choose(tools, "none") is None


@pytest.mark.parametrize("choice", [None, "auto", "required", "get_time", 5])
def test_without_tools_there_is_no_choice(choice: Any) -> None:
    assert Toolbox.choose([], choice) is None


def test_an_unknown_tool_cannot_be_named() -> None:
    error = refusal(WEATHER, choice="get_stock")
    assert error.message == "Tool error: Tool with name get_stock not found"
    assert (error.kind, error.field) == (ErrorKind.TOOL, "tool_choice")


@pytest.mark.parametrize("choice", [5, [], {}, {"function_name": "f"}, {"function": {"name": 1}}])
def test_a_choice_of_another_shape_is_refused(choice: Any) -> None:
    error = refusal(WEATHER, choice=choice)
    assert error.message.endswith(
        "tool_choice: data did not match any variant of untagged enum ToolType"
    )


def test_tools_need_distinct_names() -> None:
    assert refusal(Tool(name="")).field == "tools[0].function.name"
    error = refusal(WEATHER, WEATHER)
    assert error.message == "Tool error: two tools have the name get_weather"
    assert error.field == "tools[1].function.name"


def valid(toolbox: Toolbox, call: dict[str, Any]) -> bool:
    validator = jsonschema.Draft202012Validator(toolbox.schema())
    return bool(validator.is_valid({"function": call}))


def test_the_schema_allows_calls_of_the_tools_only() -> None:
    toolbox = Toolbox(tools=(WEATHER, TIME), may_answer=False)
    assert valid(toolbox, {"_name": "get_weather", "location": "Paris"})
    assert valid(toolbox, {"_name": "get_weather", "location": "Paris", "unit": "c"})
    assert valid(toolbox, {"_name": "get_time"})
    assert not valid(toolbox, {"_name": "get_weather"})
    assert not valid(toolbox, {"_name": "get_weather", "location": "Paris", "unit": "k"})
    assert not valid(toolbox, {"_name": "get_time", "location": "Paris"})
    assert not valid(toolbox, {"_name": "notify_error"})
    assert not valid(toolbox, {"location": "Paris"})


def test_the_name_comes_first_and_the_arguments_by_their_names() -> None:
    schema = Toolbox(tools=(WEATHER,), may_answer=False).schema()
    assert list(schema["properties"]["function"]["properties"]) == ["_name", "location", "unit"]


@pytest.mark.parametrize("key", ["$defs", "definitions"])
def test_definitions_of_two_tools_do_not_mix(key: str) -> None:
    def tool(name: str, kind: str) -> Tool:
        place = {"type": "object", "properties": {"x": {"$ref": f"#/{key}/Deep"}}}
        parameters = {
            "properties": {"place": {"$ref": f"#/{key}/Place"}},
            "required": ["place"],
            key: {"Place": place, "Deep": {"type": kind}},
        }
        return Tool(name=name, parameters=parameters)

    toolbox = Toolbox(tools=(tool("f", "string"), tool("g", "integer")), may_answer=False)
    assert valid(toolbox, {"_name": "f", "place": {"x": "a"}})
    assert valid(toolbox, {"_name": "g", "place": {"x": 1}})
    assert not valid(toolbox, {"_name": "f", "place": {"x": 1}})
    assert not valid(toolbox, {"_name": "g", "place": {"x": "a"}})


@pytest.mark.parametrize("parameters", [None, True, "x", [], {}])
def test_parameters_that_are_no_schema_count_as_none(parameters: Any) -> None:
    toolbox = Toolbox(tools=(Tool(name="f", parameters=parameters),), may_answer=False)
    assert valid(toolbox, {"_name": "f"})
    assert not valid(toolbox, {"_name": "f", "x": 1})


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"properties": []}, "properties is not an object"),
        ({"required": "x"}, "required is not a list"),
        ({"properties": {"_name": {}}}, "properties has the reserved name _name"),
        ({"$ref": "#/$defs/A"}, "$ref is not an object"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "$ref refers to itself"),
    ],
)
def test_a_schema_of_the_wrong_shape_is_a_tool_error(parameters: Any, what: str) -> None:
    error = refusal(Tool(name="f", parameters=parameters))
    assert error.message == f"Tool error: tools[0].function.parameters.{what}"


@pytest.mark.parametrize("key", ["anyOf", "oneOf", "allOf"])
def test_the_top_of_a_schema_must_list_its_properties(key: str) -> None:
    error = refusal(Tool(name="f", parameters={key: [{"properties": {"a": {}}}]}))
    text = "tools[0].function.parameters must list its properties at the top"
    assert error.message == f"Tool error: {text}"


def test_a_schema_may_refer_to_any_part_of_itself() -> None:
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/tree",
        "type": ["object", "null"],
        "properties": {
            "a": {"type": "integer"},
            "b": {"$ref": "#/properties/a"},
            "child": {"$ref": "#"},
        },
        "required": ["a"],
    }
    toolbox = Toolbox(tools=(TIME, Tool(name="f", parameters=tree)), may_answer=False)
    assert valid(toolbox, {"_name": "f", "a": 1, "b": 2, "child": {"a": 3, "child": {"a": 4}}})
    assert not valid(toolbox, {"_name": "f", "a": 1, "b": "x"})
    assert not valid(toolbox, {"_name": "f", "a": 1, "child": {"a": "x"}})
    assert not valid(toolbox, {"_name": "f", "a": 1, "child": {"function": {"_name": "f"}}})


def test_a_reference_at_the_top_is_followed() -> None:
    parameters = {
        "$ref": "#/$defs/Place",
        "$defs": {"Place": {"properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"]},
                  "X": {"type": "integer"}},
    }  # fmt: skip
    toolbox = Toolbox(tools=(Tool(name="f", parameters=parameters),), may_answer=False)
    assert valid(toolbox, {"_name": "f", "x": 1})
    assert not valid(toolbox, {"_name": "f", "x": "1"})
    assert not valid(toolbox, {"_name": "f"})


def test_the_prompt_has_the_instruction_and_the_schema() -> None:
    toolbox = Toolbox(tools=(WEATHER,), may_answer=True)
    assert toolbox.prompt(None).startswith(f"\n---\n{DEFAULT_TOOL_PROMPT}\n" + "{")
    mine = toolbox.prompt("Use these:")
    assert mine.startswith("\n---\nUse these:\n")
    assert json.loads(mine.removeprefix("\n---\nUse these:\n")) == toolbox.schema()


def test_templates_get_the_tools_in_the_form_of_openai() -> None:
    assert TIME.definition() == {
        "type": "function",
        "function": {"name": "get_time", "description": "", "parameters": {}},
    }
