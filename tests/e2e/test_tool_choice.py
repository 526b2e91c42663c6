"""The values of `tool_choice`, and the definitions of tools that are accepted."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, assert_same_text, details
from tests.e2e.stack import Stack
from tests.e2e.tool_calls import CALL, WANTED, called, choice, post, templated
from tests.e2e.tools import TIME, WEATHER, tool


class TestToolChoice:
    def test_none_means_a_text_answer(self, stack: Stack) -> None:
        answer = choice(post(stack, tool_choice="none"))
        assert set(answer["message"]) == {"role", "content"}
        assert answer == choice(post(stack, tools=[]))
        prompt = templated(stack, tool_choice="none")
        assert prompt == templated(stack, tools=[])
        assert "get_weather" not in prompt

    @pytest.mark.parametrize("chosen", [None, "auto"])
    def test_auto_leaves_it_to_the_model(self, stack: Stack, chosen: Any) -> None:
        assert called(choice(post(stack, tool_choice=chosen))["message"]) == CALL
        small_talk = [{"role": "user", "content": "What is the capital of France?"}]
        answer = choice(post(stack, tool_choice=chosen, messages=small_talk))
        text = answer["message"].get("content")
        assert text is None or not text.lstrip().startswith("{")

    def test_required_means_a_call_whatever_the_question(self, stack: Stack) -> None:
        for question in ("Hello!", "What is the capital of France?", ""):
            messages = [{"role": "user", "content": question}]
            answer = choice(
                post(stack, messages=messages, tool_choice="required", max_tokens=300, seed=1)
            )
            if (
                answer["finish_reason"] == "length"
            ):  # a model may not end an argument within the limit
                assert answer["message"]["content"].startswith('{"function": {"_name": ')
            else:
                assert called(answer["message"])["name"] in (
                    "get_weather",
                    "get_time",
                    "calculator",
                )

    @pytest.mark.parametrize(
        "chosen",
        [
            "get_time",
            {"function": {"name": "get_time"}},
            {"type": "function", "function": {"name": "get_time"}},
        ],
    )
    def test_name_means_a_call_of_that_tool(self, stack: Stack, chosen: Any) -> None:
        call = called(choice(post(stack, tool_choice=chosen))["message"])
        assert call["name"] == "get_time"
        assert list(call["arguments"]) == ["city"]
        prompt = templated(stack, tool_choice=chosen)
        assert "get_time" in prompt
        assert "get_weather" not in prompt

    @pytest.mark.parametrize(
        ("chosen", "error_type", "said"),
        [
            ("nope", "tool_error", "Tool error: Tool with name nope not found"),
            ({"function": {"name": ""}}, "tool_error", "Tool error: Tool with name  not found"),
            (5, "validation", "untagged enum ToolType"),
            ([], "validation", "untagged enum ToolType"),
            ({"function_name": "get_time"}, "validation", "untagged enum ToolType"),
            ({"type": "function", "name": "get_time"}, "validation", "untagged enum ToolType"),
        ],
    )
    def test_other_values_are_refused(
        self, stack: Stack, api: ReflectionClient, chosen: Any, error_type: str, said: str
    ) -> None:
        wanted = {**WANTED, "tool_choice": chosen}
        for path in ("/v1/chat/completions", "/chat_tokenize"):
            reply = stack.http.post(path, json=wanted)
            assert reply.status_code == 422
            assert reply.json()["error_type"] == error_type
            assert said in reply.json()["error"]
        with pytest.raises(grpc.RpcError) as refused:
            api.collect("Chat", wanted)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert_same_text(refused.value, reply.json()["error"])
        assert details(refused.value) == (error_type, "tool_choice")


class TestToolDefinitions:
    def test_schemas_may_contain_references(self, stack: Stack) -> None:
        def lookup(name: str, cities: list[str]) -> dict[str, Any]:
            described = tool(name, "Look something up", "city")
            described["function"]["parameters"] |= {
                "properties": {"city": {"$ref": "#/$defs/City"}},
                "$defs": {"City": {"enum": cities}},
            }
            return described

        tools = [lookup("get_weather", ["Lima", "Rome"]), lookup("get_time", ["Oslo", "Bonn"])]
        for name, cities in (("get_weather", ("Lima", "Rome")), ("get_time", ("Oslo", "Bonn"))):
            call = called(choice(post(stack, tools=tools, tool_choice=name))["message"])
            assert call["name"] == name
            assert call["arguments"]["city"] in cities

    def test_schema_may_be_in_the_field_of_the_contract(self, stack: Stack) -> None:
        described = json.loads(json.dumps(WEATHER))
        described["function"]["arguments"] = described["function"].pop("parameters")
        assert called(choice(post(stack, tools=[described]))["message"]) == CALL

    def test_arguments_may_be_numbers_and_enums(self, stack: Stack) -> None:
        described = tool("get_weather", "Get the weather", "location")
        described["function"]["parameters"]["properties"] |= {
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        }
        described["function"]["parameters"]["required"] = ["location", "days", "unit"]
        answer = choice(post(stack, tools=[described], tool_choice="required"))
        arguments = called(answer["message"])["arguments"]
        assert set(arguments) == {"location", "days", "unit"}
        assert 1 <= arguments["days"] <= 7
        assert arguments["unit"] in ("celsius", "fahrenheit")

    @pytest.mark.parametrize(
        ("change", "field", "said"),
        [
            ({"name": ""}, "tools[0].function.name", "missing field `name`"),
            ({"name": "get_time"}, "tools[1].function.name", "two tools have the name get_time"),
            (
                {"parameters": {"properties": []}},
                "tools[0].function.parameters.properties",
                "is not an object",
            ),
        ],
    )
    def test_definitions_of_the_wrong_shape_are_refused(
        self, stack: Stack, api: ReflectionClient, change: dict[str, Any], field: str, said: str
    ) -> None:
        broken = {"type": "function", "function": {**WEATHER["function"], **change}}
        wanted = {**WANTED, "tools": [broken, TIME]}
        reply = stack.http.post("/v1/chat/completions", json=wanted)
        assert reply.status_code == 422
        assert said in reply.json()["error"]
        with pytest.raises(grpc.RpcError) as refused:
            api.collect("Chat", wanted)
        assert details(refused.value)[1] == field

    def test_unenforceable_schema_keywords_are_refused(self, stack: Stack) -> None:
        described = tool("f", "Do it", "x")
        described["function"]["parameters"]["properties"] = {
            "x": {"type": "array", "uniqueItems": True}
        }
        wanted = {**WANTED, "tools": [described], "tool_choice": "required"}
        reply = stack.http.post("/v1/chat/completions", json=wanted)
        assert reply.status_code == 422
        assert "uniqueItems" in reply.json()["error"]
