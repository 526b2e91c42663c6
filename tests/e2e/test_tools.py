"""Tool calls as callers see them: the loop of OpenAI's clients, TGI's form, and typed gRPC."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from huggingface_hub import InferenceClient
from openai import OpenAI, UnprocessableEntityError

from service.openai.tools import DEFAULT_TOOL_PROMPT
from tests.e2e.contract import DONE, events
from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import DEADLINE_S, Stack, running
from tests.e2e.tools import TIME, TIME_QUESTION, TOOLS, WEATHER, WEATHER_QUESTION, tool
from tests.paths import REPOSITORY

HEADER = "x-tool-call-format"
QUESTION: Any = [{"role": "user", "content": WEATHER_QUESTION}]
WANTED: dict[str, Any] = {
    "messages": QUESTION,
    "tools": TOOLS,
    "max_tokens": 100,
    "temperature": 0.0,
}
CALL = {"name": "get_weather", "arguments": {"location": "Paris"}}
RESULT = json.dumps({"temperature": 20, "conditions": "sunny"})


def post(stack: Stack, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    body = {**WANTED, **changes}
    reply = stack.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def choice(reply: httpx.Response) -> dict[str, Any]:
    (result,) = reply.json()["choices"]
    return dict(result)


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream."""
    *payloads, done = events(reply)
    assert done == DONE
    return [json.loads(payload)["choices"][0] for payload in payloads]


def called(message: dict[str, Any]) -> dict[str, Any]:
    """The one call of an answer, with its arguments as an object."""
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {"name": call["function"]["name"], "arguments": arguments}


def streamed_call(stream: list[dict[str, Any]]) -> tuple[str, str]:
    """A call in TGI's form: the name, and the arguments as they were spelt."""
    calls = [item["delta"]["tool_calls"] for item in stream if "tool_calls" in item["delta"]]
    names = [call["function"]["name"] for call in calls]
    assert names[1:] == [None] * (len(names) - 1)
    assert {(call["index"], call["id"], call["type"]) for call in calls} == {(0, "0", "function")}
    return names[0], "".join(call["function"]["arguments"] for call in calls)


def templated(stack: Stack, **changes: Any) -> str:
    """The prompt of a conversation."""
    reply = stack.http.post("/chat_tokenize", json={**WANTED, **changes})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["templated_text"])


class TestTheContractsForm:
    def test_an_answer_has_the_call_as_an_object(self, stack: Stack) -> None:
        answer = choice(post(stack))
        assert answer["message"] == {
            "role": "assistant",
            "tool_calls": [
                {"id": "0", "type": "function", "function": {"description": None, **CALL}}
            ],
        }
        assert answer["finish_reason"] == "eos_token"

    def test_a_stream_has_one_call_in_pieces(self, stack: Stack) -> None:
        stream = chunks(post(stack, stream=True))
        name, arguments = streamed_call(stream)
        assert {"name": name, "arguments": json.loads(arguments)} == CALL
        assert all(item["delta"]["role"] == "assistant" for item in stream)
        reasons = [item["finish_reason"] for item in stream]
        assert reasons == [None] * (len(stream) - 1) + ["eos_token"]

    def test_a_stream_says_what_the_whole_answer_says(self, stack: Stack) -> None:
        for question in (WEATHER_QUESTION, TIME_QUESTION):
            messages = [{"role": "user", "content": question}]
            whole = choice(post(stack, messages=messages, tool_choice="required"))
            stream = chunks(post(stack, messages=messages, tool_choice="required", stream=True))
            name, arguments = streamed_call(stream)
            assert {"name": name, "arguments": json.loads(arguments)} == called(whole["message"])
            openai = {HEADER: "openai"}
            spelt = choice(post(stack, openai, messages=messages, tool_choice="required"))
            assert spelt["message"]["tool_calls"][0]["function"]["arguments"] == arguments

    def test_a_call_that_was_cut_off_is_text(self, stack: Stack) -> None:
        answer = choice(post(stack, tool_choice="required", max_tokens=12))
        assert answer["message"]["content"].startswith('{"function": {')
        assert answer["finish_reason"] == "length"

    def test_log_probabilities_of_a_stream_are_all_there(self, stack: Stack) -> None:
        wanted = {"logprobs": True, "top_logprobs": 2}
        whole = choice(post(stack, **wanted))["logprobs"]["content"]
        stream = chunks(post(stack, **wanted, stream=True))
        parts = [item["logprobs"] or {"content": []} for item in stream]
        assert [entry for part in parts for entry in part["content"]] == whole
        assert min(entry["logprob"] for entry in whole) < 0.0
        assert max(entry["logprob"] for entry in whole) == 0.0  # what the grammar forced

    def test_huggingface_hub_reads_it(self, stack: Stack) -> None:
        with_tools: dict[str, Any] = {"tools": TOOLS, "tool_choice": "auto", "max_tokens": 100}
        hub = InferenceClient(stack.url, timeout=DEADLINE_S)
        output = hub.chat_completion(QUESTION, temperature=0.0, **with_tools)
        (call,) = output.choices[0].message.tool_calls or []
        assert {"name": call.function.name, "arguments": call.function.arguments} == CALL
        stream = hub.chat_completion(QUESTION, temperature=0.0, stream=True, **with_tools)
        # One object in TGI's form, where the client's types promise a list.
        calls: list[Any] = [chunk.choices[0].delta.tool_calls for chunk in stream]
        functions = [call.function for call in calls if call is not None]
        assert functions[0].name == "get_weather"
        arguments = "".join(function.arguments for function in functions)
        assert json.loads(arguments) == {"location": "Paris"}


class TestOpenAIsForm:
    @pytest.fixture
    def openai(self, stack: Stack) -> Iterator[OpenAI]:
        with OpenAI(base_url=f"{stack.url}/v1", api_key="-", timeout=DEADLINE_S) as client:
            yield client

    def test_the_loop(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {"model": "tgi", "tools": TOOLS, "max_tokens": 100}
        first = openai.chat.completions.create(messages=QUESTION, temperature=0.0, **wanted)
        message = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert re.fullmatch("call_[0-9a-f]{24}", call.id)
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"location": "Paris"}
        result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
        conversation: Any = [*QUESTION, message, result]
        second = openai.chat.completions.create(messages=conversation, temperature=0.0, **wanted)
        assert second.choices[0].finish_reason == "eos_token"
        assert second.choices[0].message.tool_calls is None
        assert "20" in (second.choices[0].message.content or "")

    def test_the_loop_with_the_helper_for_streams(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {"model": "tgi", "tools": TOOLS, "max_tokens": 100}
        with openai.chat.completions.stream(messages=QUESTION, temperature=0.0, **wanted) as stream:
            kinds = [event.type for event in stream]
            first = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds
        assert "tool_calls.function.arguments.done" in kinds
        assert first.finish_reason == "tool_calls"
        (call,) = first.message.tool_calls or []
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"location": "Paris"}
        result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
        conversation: Any = [*QUESTION, first.message, result]
        with openai.chat.completions.stream(
            messages=conversation, temperature=0.0, **wanted
        ) as stream:
            kinds = [event.type for event in stream]
            second = stream.get_final_completion().choices[0]
        assert "content.delta" in kinds
        assert second.message.role == "assistant"
        assert "20" in (second.message.content or "")

    def test_the_helper_sees_what_the_whole_answer_is(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {**WANTED, "model": "tgi"}
        whole = openai.chat.completions.create(**wanted).choices[0].message.tool_calls or []
        with openai.chat.completions.stream(**wanted) as stream:
            streamed = stream.get_final_completion().choices[0].message.tool_calls or []
        assert [call.function.arguments for call in whole] == [
            call.function.arguments for call in streamed
        ]
        assert whole[0].id != streamed[0].id

    def test_a_format_is_read_into_a_model(self, openai: OpenAI) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
        output = openai.chat.completions.create(
            model="tgi",
            messages=QUESTION,
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "place", "schema": schema, "strict": True},
            },
        )
        assert json.loads(output.choices[0].message.content or "")["city"] in ("Paris", "Oslo")

    def test_a_refusal_has_its_text(self, openai: OpenAI) -> None:
        with pytest.raises(UnprocessableEntityError) as refused:
            openai.chat.completions.create(
                model="tgi",
                messages=QUESTION,
                tools=TOOLS,
                tool_choice={"type": "function", "function": {"name": "nope"}},
            )
        assert refused.value.response.json() == {
            "error": "Tool error: Tool with name nope not found",
            "error_type": "tool_error",
        }


OPENAI_CALL = {"name": "get_weather", "arguments": '{"location": "Paris"}'}


def is_openai(answer: dict[str, Any]) -> bool:
    """The form of an answer's call, in which all must agree."""
    message = answer["message"]
    (call,) = message["tool_calls"]
    if call["id"] == "0":
        assert "content" not in message
        assert call["function"] == {"description": None, **CALL}
        assert answer["finish_reason"] == "eos_token"
        return False
    assert message["content"] is None
    assert call["function"] == OPENAI_CALL
    assert answer["finish_reason"] == "tool_calls"
    return True


SDK = {"x-stainless-lang": "python"}


class TestTheChoiceOfAForm:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({}, False),
            ({HEADER: "tgi"}, False),
            ({HEADER: "openai"}, True),
            ({HEADER: "auto"}, False),
            (SDK, True),
            ({**SDK, HEADER: "auto"}, True),
            ({**SDK, HEADER: "tgi"}, False),
        ],
    )
    def test_is_the_caller_s(self, stack: Stack, headers: dict[str, str], expected: bool) -> None:
        assert is_openai(choice(post(stack, headers))) is expected
        deltas = [item["delta"] for item in chunks(post(stack, headers, stream=True))]
        forms = {type(delta["tool_calls"]) for delta in deltas if "tool_calls" in delta}
        assert forms == {list if expected else dict}

    def test_must_be_one(self, stack: Stack, api: ReflectionClient) -> None:
        said = (
            "Input validation error: the header `x-tool-call-format` must be `tgi`, `openai` or "
            "`auto`. Given: yaml"
        )
        reply = stack.http.post("/v1/chat/completions", json=WANTED, headers={HEADER: "yaml"})
        assert (reply.status_code, reply.json()["error"]) == (422, said)
        with pytest.raises(grpc.RpcError) as refused:
            list(api.call("Chat", WANTED, metadata={HEADER: "yaml"}))
        assert refused.value.details() == said
        assert details(refused.value) == ("validation", HEADER)

    def test_is_metadata_of_grpc(self, api: ReflectionClient) -> None:
        for wanted in ("tgi", "openai"):
            (reply,) = api.call("Chat", WANTED, metadata={HEADER: wanted})
            (answer,) = as_dict(reply)["completion"]["choices"]
            (call,) = answer["message"]["tool_calls"]
            expected = OPENAI_CALL if wanted == "openai" else CALL
            assert call["function"] == expected
            reason = "tool_calls" if wanted == "openai" else "eos_token"
            assert answer["finish_reason"] == reason
            assert (call["id"] == "0") == (wanted == "tgi")

    def test_is_the_server_s_by_default(self, tmp_path: Path) -> None:
        with running(tmp_path / "log", "--tool-call-format=openai") as server:
            assert is_openai(choice(post(server)))
            assert is_openai(choice(post(server, SDK)))
            assert not is_openai(choice(post(server, {HEADER: "tgi"})))
            assert not is_openai(choice(post(server, {HEADER: "auto"})))


class TestToolChoice:
    def test_none_is_an_answer_in_words(self, stack: Stack) -> None:
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

    def test_required_is_a_call_whatever_was_said(self, stack: Stack) -> None:
        for words in ("Hello!", "What is the capital of France?", ""):
            messages = [{"role": "user", "content": words}]
            answer = choice(
                post(stack, messages=messages, tool_choice="required", max_tokens=300, seed=1)
            )
            if answer["finish_reason"] == "length":  # a model may never end an argument
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
    def test_a_name_is_a_call_of_that_tool(self, stack: Stack, chosen: Any) -> None:
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
    def test_anything_else_is_refused(
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
        assert refused.value.details() == reply.json()["error"]
        assert details(refused.value) == (error_type, "tool_choice")


class TestTools:
    def test_may_refer_to_definitions(self, stack: Stack) -> None:
        def place(name: str, cities: list[str]) -> dict[str, Any]:
            described = tool(name, "Look something up", "city")
            described["function"]["parameters"] |= {
                "properties": {"city": {"$ref": "#/$defs/City"}},
                "$defs": {"City": {"enum": cities}},
            }
            return described

        tools = [place("get_weather", ["Lima", "Rome"]), place("get_time", ["Oslo", "Bonn"])]
        for name, cities in (("get_weather", ("Lima", "Rome")), ("get_time", ("Oslo", "Bonn"))):
            call = called(choice(post(stack, tools=tools, tool_choice=name))["message"])
            assert call["name"] == name
            assert call["arguments"]["city"] in cities

    def test_may_have_their_schema_where_the_contract_has_it(self, stack: Stack) -> None:
        described = json.loads(json.dumps(WEATHER))
        described["function"]["arguments"] = described["function"].pop("parameters")
        assert called(choice(post(stack, tools=[described]))["message"]) == CALL

    def test_may_have_optional_arguments_of_all_types(self, stack: Stack) -> None:
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
    def test_of_the_wrong_shape_are_refused(
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

    def test_with_keywords_that_cannot_be_enforced_are_refused(self, stack: Stack) -> None:
        described = tool("f", "Do it", "x")
        described["function"]["parameters"]["properties"] = {
            "x": {"type": "array", "uniqueItems": True}
        }
        wanted = {**WANTED, "tools": [described], "tool_choice": "required"}
        reply = stack.http.post("/v1/chat/completions", json=wanted)
        assert reply.status_code == 422
        assert "uniqueItems" in reply.json()["error"]

    def test_exclude_a_format(self, stack: Stack, api: ReflectionClient) -> None:
        wanted = {**WANTED, "response_format": {"type": "json_object"}}
        reply = stack.http.post("/v1/chat/completions", json=wanted)
        assert (reply.status_code, reply.json()) == (
            422,
            {
                "error": "Grammar and tools are mutually exclusive",
                "error_type": "grammar and tools",
            },
        )
        with pytest.raises(grpc.RpcError) as refused:
            api.collect("Chat", wanted)
        assert refused.value.details() == "Grammar and tools are mutually exclusive"


class TestThePrompt:
    def test_has_the_tools_where_the_template_puts_them(self, stack: Stack) -> None:
        prompt = templated(stack)
        assert all(item["function"]["name"] in prompt for item in TOOLS)
        assert DEFAULT_TOOL_PROMPT not in prompt

    def test_has_the_caller_s_instruction_behind_the_last_message(self, stack: Stack) -> None:
        prompt = templated(stack, tool_prompt="Use these functions:")
        start = prompt.index(f"{WEATHER_QUESTION}\n---\nUse these functions:\n") + len(
            f"{WEATHER_QUESTION}\n---\nUse these functions:\n"
        )
        schema, _ = json.JSONDecoder().raw_decode(prompt[start:])
        assert schema["required"] == ["function"]

    def test_has_the_default_instruction_if_the_template_has_no_place(self, tmp_path: Path) -> None:
        config = json.loads((REPOSITORY / "models/demo/tokenizer_config.json").read_text())
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**config, "chat_template": template}))
        with running(tmp_path / "log", f"--tokenizer-config-path={path}") as server:
            start = f"<user>{WEATHER_QUESTION}\n---\n{DEFAULT_TOOL_PROMPT}\n" + '{"type": "object"'
            assert templated(server).startswith(start)
            parts: Any = [{"role": "user", "content": [{"type": "text", "text": WEATHER_QUESTION}]}]
            assert templated(server, messages=parts).startswith(start)
            mine = templated(server, tool_prompt="Mine:")
            assert mine.startswith(f"<user>{WEATHER_QUESTION}\n---\nMine:\n" + '{"type": "object"')
            assert templated(server, tool_choice="none") == f"<user>{WEATHER_QUESTION}<assistant>"
            assert choice(post(server, tool_choice="get_time", max_tokens=12))["message"]

    def test_is_the_same_however_arguments_were_written(self, stack: Stack) -> None:
        prompts = {templated(stack, messages=answered(form)) for form in ARGUMENTS}
        assert len(prompts) == 1
        assert '{"_name": "get_weather", "location": "Paris"}' in prompts.pop()


ARGUMENTS: list[Any] = [{"location": "Paris"}, '{"location": "Paris"}', ' {"location":"Paris"}']


def answered(arguments: Any) -> list[dict[str, Any]]:
    """A conversation that is waiting for the answer from a tool's result."""
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
    ]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_result_is_answered(stack: Stack, api: ReflectionClient, arguments: Any) -> None:
    messages = answered(arguments)
    answer = choice(post(stack, messages=messages))
    assert "20" in answer["message"]["content"]
    (reply,) = api.collect("Chat", {**WANTED, "messages": messages})
    assert reply.completion.choices[0].message.content == answer["message"]["content"]


class TestTypedGrpc:
    def test_an_answer(self, api: ReflectionClient) -> None:
        (reply,) = api.collect("Chat", WANTED)
        message = reply.completion.choices[0].message
        assert not message.HasField("content")
        assert called(as_dict(message)) == CALL
        assert reply.completion.choices[0].finish_reason == "eos_token"

    def test_a_stream(self, api: ReflectionClient) -> None:
        replies = api.collect("Chat", {**WANTED, "stream": True})
        choices = [reply.chunk.choices[0] for reply in replies]
        calls = [call.function for item in choices for call in item.delta.tool_calls]
        assert [call.name for call in calls] == ["get_weather"] + [""] * (len(calls) - 1)
        arguments = "".join(call.arguments.string_value for call in calls)
        assert json.loads(arguments) == {"location": "Paris"}
        assert [item.finish_reason for item in choices if item.HasField("finish_reason")] == [
            "eos_token"
        ]

    def test_a_stream_in_words(self, api: ReflectionClient) -> None:
        wanted = {**WANTED, "tool_choice": "none"}
        (whole,) = api.collect("Chat", wanted)
        replies = api.collect("Chat", {**wanted, "stream": True})
        text = "".join(reply.chunk.choices[0].delta.content for reply in replies)
        assert text == whole.completion.choices[0].message.content
