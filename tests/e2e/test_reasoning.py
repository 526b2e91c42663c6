"""Reasoning beside the answer, and what a request says to the chat template, over both faces."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from tests.e2e.native_models import END_OF_THOUGHT
from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import Stack
from tests.e2e.tool_calls import choice, chunks, templated

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WANTED: dict[str, Any] = {
    "messages": QUESTION, "max_tokens": 12, "temperature": 0.0,
    "tools": None, "tool_choice": None,
}  # fmt: skip
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}
ENDED = {"logit_bias": {str(END_OF_THOUGHT): 100}}  # the reasoning ends with the first token
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
          "additionalProperties": False}  # fmt: skip


def posted(stack: Stack, **changes: Any) -> Any:
    reply = stack.http.post("/v1/chat/completions", json={**WANTED, **changes})
    assert reply.status_code == 200, reply.text
    return reply


def message(stack: Stack, **changes: Any) -> dict[str, Any]:
    return dict(choice(posted(stack, **changes))["message"])


def typed(stack: Stack, **changes: Any) -> dict[str, Any]:
    fields = {key: value for key, value in {**WANTED, **changes}.items() if value is not None}
    (reply,) = ReflectionClient(stack.direct).collect("Chat", fields)
    return dict(as_dict(reply)["completion"]["choices"][0]["message"])


def test_an_open_thought_is_reasoning_whole_streamed_and_typed(thinking: Stack) -> None:
    whole = message(thinking)
    assert whole["content"] == ""
    assert whole["reasoning_content"]
    deltas = [item["delta"] for item in chunks(posted(thinking, stream=True))]
    assert (
        "".join(item.get("reasoning_content", "") for item in deltas)
        == (whole["reasoning_content"])
    )
    assert not any(item.get("content") for item in deltas)
    assert typed(thinking)["reasoning_content"] == whole["reasoning_content"]


def test_a_template_that_closes_it_leaves_an_answer_alone(thinking: Stack) -> None:
    whole = message(thinking, **AT_ONCE)
    assert whole["content"]
    assert "reasoning_content" not in whole
    assert typed(thinking, **AT_ONCE)["content"] == whole["content"]


@pytest.mark.parametrize("reasoning", [AT_ONCE, ENDED])
def test_a_grammar_begins_after_the_reasoning(thinking: Stack, reasoning: dict[str, Any]) -> None:
    for form in (
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    ):
        wanted = {**reasoning, "max_tokens": 40, "response_format": form}
        assert json.loads(message(thinking, **wanted)["content"])["n"] in (1, 2)
        assert json.loads(typed(thinking, **wanted)["content"])["n"] in (1, 2)


def test_an_answer_that_continues_a_thought_reasons_on(thinking: Stack) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "<think>Let me see"}]
    wanted = {"messages": begun, "continue_final_message": True}
    assert message(thinking, **wanted)["reasoning_content"]
    done = [*QUESTION, {"role": "assistant", "content": "<think>a</think>The capital"}]
    answer = message(thinking, messages=done, continue_final_message=True)
    assert "reasoning_content" not in answer
    assert answer["content"]


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "<|end|><|assistant|><think>\n"),
        ({"add_generation_prompt": False}, "<|end|>"),
        ({"reasoning_effort": "low"}, "<|system|>effort low<|end|><|assistant|><think>\n"),
        ({"documents": [{"text": "a"}, {"text": "b"}]},
         "<|system|>a;b;<|end|><|assistant|><think>\n"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Pa", "reasoning_content": "r"}],
          "add_generation_prompt": False}, "<|assistant|>Pa(r)<|end|>"),
    ],
)  # fmt: skip
def test_the_template_gets_the_fields(thinking: Stack, fields: dict[str, Any], end: str) -> None:
    assert templated(thinking, **{**WANTED, **fields}).endswith(end)
    wanted = {key: value for key, value in {**WANTED, **fields}.items() if value is not None}
    reply: Any = ReflectionClient(thinking.direct).call("ChatTokenize", wanted)
    assert reply.templated_text.endswith(end)


def test_the_template_of_a_long_conversation_gets_them_too(thinking: Stack) -> None:
    long = [{"role": "user", "content": "because " * 20_000}]
    end = "<|system|>effort high<|end|><|assistant|><think>\n\n</think>\n\n"
    fields = {"messages": long, "reasoning_effort": "high", **AT_ONCE}
    assert templated(thinking, **{**WANTED, **fields}).endswith(end)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"response_format": {"type": "json_object", "value": {}, "schema": {}}},
         "response_format.schema"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused_alike(
    thinking: Stack, fields: dict[str, Any], name: str
) -> None:
    reply = thinking.http.post("/v1/chat/completions", json={**WANTED, **fields})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    wanted = {key: value for key, value in {**WANTED, **fields}.items() if value is not None}
    with pytest.raises(grpc.RpcError) as refused:
        ReflectionClient(thinking.direct).collect("Chat", wanted)
    assert details(refused.value) == ("validation", name)
    assert refused.value.details() == reply.json()["error"]
