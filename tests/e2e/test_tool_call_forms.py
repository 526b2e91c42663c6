"""Tool calls in the form of TGI and of OpenAI, over REST and gRPC, and the choice between them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from huggingface_hub import InferenceClient
from openai import OpenAI, UnprocessableEntityError

from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import DEADLINE_S, Stack, running
from tests.e2e.tool_calls import (
    CALL,
    HEADER,
    OPENAI_CALL,
    QUESTION,
    RESULT,
    WANTED,
    called,
    choice,
    chunks,
    post,
    streamed_call,
)
from tests.e2e.tools import CONTRACT_TOOLS, TIME_QUESTION, TOOLS, WEATHER_QUESTION

TGI = {HEADER: "tgi"}


class TestTgiForm:
    def test_answer_has_the_call_as_an_object(self, stack: Stack) -> None:
        answer = choice(post(stack, TGI))
        assert answer["message"] == {
            "role": "assistant",
            "tool_calls": [
                {"id": "0", "type": "function", "function": {"description": None, **OPENAI_CALL}}
            ],
        }
        assert answer["finish_reason"] == "tool_calls"

    def test_stream_has_one_call_in_pieces(self, stack: Stack) -> None:
        stream = chunks(post(stack, TGI, stream=True))
        name, arguments = streamed_call(stream)
        assert {"name": name, "arguments": json.loads(arguments)} == CALL
        assert all(item["delta"]["role"] == "assistant" for item in stream)
        reasons = [item["finish_reason"] for item in stream]
        assert reasons == [None] * (len(stream) - 1) + ["tool_calls"]

    def test_stream_equals_the_whole_answer(self, stack: Stack) -> None:
        for question in (WEATHER_QUESTION, TIME_QUESTION):
            messages = [{"role": "user", "content": question}]
            whole = choice(post(stack, TGI, messages=messages, tool_choice="required"))
            stream = chunks(
                post(stack, TGI, messages=messages, tool_choice="required", stream=True)
            )
            name, arguments = streamed_call(stream)
            assert {"name": name, "arguments": json.loads(arguments)} == called(whole["message"])
            openai = {HEADER: "openai"}
            spelt = choice(post(stack, openai, messages=messages, tool_choice="required"))
            assert spelt["message"]["tool_calls"][0]["function"]["arguments"] == arguments

    @pytest.mark.parametrize("max_tokens", [1, 4, 12])
    def test_truncated_call_is_the_same_whole_and_streamed(
        self, stack: Stack, max_tokens: int
    ) -> None:
        wanted = {"tool_choice": "required", "max_tokens": max_tokens}
        answer = choice(post(stack, TGI, **wanted))
        stream = chunks(post(stack, TGI, stream=True, **wanted))
        calls = answer["message"].get("tool_calls", [])
        pieces = [item["delta"]["tool_calls"] for item in stream if "tool_calls" in item["delta"]]
        assert "".join(piece["function"]["arguments"] for piece in pieces) == "".join(
            call["function"]["arguments"] for call in calls
        )
        assert not answer["message"].get("content")
        assert not any(item["delta"].get("content") for item in stream)
        assert answer["finish_reason"] == stream[-1]["finish_reason"] == "length"

    def test_stream_has_all_log_probabilities(self, stack: Stack) -> None:
        wanted = {"logprobs": True, "top_logprobs": 2}
        whole = choice(post(stack, TGI, **wanted))["logprobs"]["content"]
        stream = chunks(post(stack, TGI, **wanted, stream=True))
        parts = [item["logprobs"] or {"content": []} for item in stream]
        assert [entry for part in parts for entry in part["content"]] == whole
        assert min(entry["logprob"] for entry in whole) < 0.0
        assert max(entry["logprob"] for entry in whole) == 0.0  # what the grammar forced

    def test_huggingface_hub_reads_calls(self, stack: Stack) -> None:
        with_tools: dict[str, Any] = {"tools": TOOLS, "tool_choice": "auto", "max_tokens": 100}
        hub = InferenceClient(stack.url, timeout=DEADLINE_S)
        output = hub.chat_completion(QUESTION, temperature=0.0, **with_tools)
        (call,) = output.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == CALL["arguments"]
        stream = hub.chat_completion(QUESTION, temperature=0.0, stream=True, **with_tools)
        deltas = [chunk.choices[0].delta for chunk in stream]
        functions = [call.function for delta in deltas for call in delta.tool_calls or []]
        assert functions[0].name == "get_weather"
        arguments = "".join(function.arguments for function in functions)
        assert json.loads(arguments) == {"location": "Paris"}


class TestOpenAiForm:
    @pytest.fixture
    def openai(self, stack: Stack) -> Iterator[OpenAI]:
        with OpenAI(base_url=f"{stack.url}/v1", api_key="-", timeout=DEADLINE_S) as client:
            yield client

    def test_call_result_and_answer(self, openai: OpenAI) -> None:
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
        assert second.choices[0].finish_reason == "stop"
        assert second.choices[0].message.tool_calls is None
        assert "20" in (second.choices[0].message.content or "")

    def test_call_result_and_answer_with_the_stream_helper(self, openai: OpenAI) -> None:
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

    def test_stream_helper_sees_the_calls_of_the_whole_answer(self, openai: OpenAI) -> None:
        wanted: dict[str, Any] = {**WANTED, "model": "tgi"}
        whole = openai.chat.completions.create(**wanted).choices[0].message.tool_calls or []
        with openai.chat.completions.stream(**wanted) as stream:
            streamed = stream.get_final_completion().choices[0].message.tool_calls or []
        assert [call.function.arguments for call in whole] == [
            call.function.arguments for call in streamed
        ]
        assert whole[0].id != streamed[0].id

    def test_json_schema_format_is_followed(self, openai: OpenAI) -> None:
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

    def test_refusal_has_its_text(self, openai: OpenAI) -> None:
        with pytest.raises(UnprocessableEntityError) as refused:
            openai.chat.completions.create(
                model="tgi",
                messages=QUESTION,
                tools=TOOLS,
                tool_choice={"type": "function", "function": {"name": "nope"}},
            )
        assert refused.value.response.json() == {
            "error": {
                "message": "Tool error: Tool with name nope not found",
                "type": "invalid_request_error",
                "param": "tool_choice",
                "code": "tool_error",
            }
        }


def is_openai(answer: dict[str, Any]) -> bool:
    """Whether an answer is in the form of OpenAI; it must not mix the two forms."""
    message = answer["message"]
    (call,) = message["tool_calls"]
    if call["id"] == "0":
        assert "content" not in message
        assert call["function"] == {"description": None, **OPENAI_CALL}
        assert answer["finish_reason"] == "tool_calls"
        return False
    assert message["content"] is None
    assert call["function"] == OPENAI_CALL
    assert answer["finish_reason"] == "tool_calls"
    return True


# A header that the SDK of OpenAI sends.
SDK = {"x-stainless-lang": "python"}


class TestChoiceOfTheForm:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({HEADER: "tgi"}, False),
            ({HEADER: "openai"}, True),
            (SDK, True),
            ({**SDK, HEADER: "auto"}, True),
            ({**SDK, HEADER: "tgi"}, False),
        ],
    )
    def test_header_chooses_the_form(
        self, stack: Stack, headers: dict[str, str], expected: bool
    ) -> None:
        assert is_openai(choice(post(stack, headers))) is expected
        deltas = [item["delta"] for item in chunks(post(stack, headers, stream=True))]
        forms = {type(delta["tool_calls"]) for delta in deltas if "tool_calls" in delta}
        assert forms == {list if expected else dict}

    @pytest.mark.parametrize("headers", [{}, {HEADER: "auto"}])
    @pytest.mark.parametrize(
        ("tools", "expected"),
        [(TOOLS, True), (CONTRACT_TOOLS, False), ([*TOOLS[:1], *CONTRACT_TOOLS[1:]], False)],
    )
    def test_key_of_the_schemas_chooses_the_form(
        self, stack: Stack, headers: dict[str, str], tools: list[dict[str, Any]], expected: bool
    ) -> None:
        assert is_openai(choice(post(stack, headers, tools=tools))) is expected
        reply = post(stack, headers, tools=tools, stream=True)
        deltas = [item["delta"] for item in chunks(reply)]
        forms = {type(delta["tool_calls"]) for delta in deltas if "tool_calls" in delta}
        assert forms == {list if expected else dict}

    def test_unknown_form_is_refused(self, stack: Stack, api: ReflectionClient) -> None:
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

    def test_grpc_metadata_chooses_the_form(self, api: ReflectionClient) -> None:
        for wanted in ("tgi", "openai"):
            (reply,) = api.call("Chat", WANTED, metadata={HEADER: wanted})
            (answer,) = as_dict(reply)["completion"]["choices"]
            (call,) = answer["message"]["tool_calls"]
            assert call["function"] == OPENAI_CALL
            assert answer["finish_reason"] == "tool_calls"
            assert answer["reason"] == "FINISH_REASON_TOOL_CALLS"
            assert (call["id"] == "0") == (wanted == "tgi")

    def test_server_option_is_the_default(self, tmp_path: Path) -> None:
        with running(tmp_path / "log", "--tool-call-format=openai") as server:
            assert is_openai(choice(post(server)))
            assert is_openai(choice(post(server, SDK)))
            assert not is_openai(choice(post(server, {HEADER: "tgi"})))
            assert is_openai(choice(post(server, tools=CONTRACT_TOOLS)))
            assert not is_openai(choice(post(server, {HEADER: "auto"}, tools=CONTRACT_TOOLS)))


class TestTypedGrpc:
    def test_answer_has_the_call(self, api: ReflectionClient) -> None:
        (reply,) = api.collect("Chat", WANTED)
        message = reply.completion.choices[0].message
        assert not message.HasField("content")
        assert called(as_dict(message)) == CALL
        assert reply.completion.choices[0].finish_reason == "tool_calls"

    def test_stream_has_the_call_in_pieces(self, api: ReflectionClient) -> None:
        replies = api.collect("Chat", {**WANTED, "stream": True})
        choices = [reply.chunk.choices[0] for reply in replies]
        calls = [call.function for item in choices for call in item.delta.tool_calls]
        assert [call.name for call in calls] == ["get_weather"] + [""] * (len(calls) - 1)
        arguments = "".join(call.arguments.string_value for call in calls)
        assert json.loads(arguments) == {"location": "Paris"}
        assert [item.finish_reason for item in choices if item.HasField("finish_reason")] == [
            "tool_calls"
        ]

    def test_text_stream_equals_the_whole_answer(self, api: ReflectionClient) -> None:
        wanted = {**WANTED, "tool_choice": "none"}
        (whole,) = api.collect("Chat", wanted)
        replies = api.collect("Chat", {**wanted, "stream": True})
        text = "".join(reply.chunk.choices[0].delta.content for reply in replies)
        assert text == whole.completion.choices[0].message.content
