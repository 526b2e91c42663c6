"""Bodies and messages of the Responses API become the requests of a chat."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.codec.responses.reading import request_of_body, request_of_message
from service.errors import ServiceError
from service.grammar.spec import Grammar
from service.openai.chat import Message
from service.pb.tokenwire import v1 as pb
from tests.service.fakes import LIMITS

SCHEMA = {"type": "object"}


def read(**body: Any) -> Any:
    return request_of_body(json.dumps({"input": "hi", **body}).encode(), LIMITS)


def test_what_is_absent_is_as_many_tokens_as_fit_and_sampling_as_it_is() -> None:
    found = read().chat
    assert found.messages == (Message(role="user", content="hi"),)
    assert found.parameters.max_new_tokens is None
    assert (found.parameters.do_sample, found.parameters.top_p) == (True, None)
    assert found.tool_call_format == "openai"


@pytest.mark.parametrize(("given", "top_p"), [(1.0, None), (0.5, 0.5)])
def test_a_top_p_of_one_is_off(given: float, top_p: float | None) -> None:
    assert read(top_p=given).chat.parameters.top_p == top_p


def test_a_temperature_of_zero_is_greedy() -> None:
    found = read(temperature=0).chat.parameters
    assert (found.do_sample, found.temperature) == (False, None)


@pytest.mark.parametrize("store", [None, False, True])
def test_nothing_is_stored_whatever_is_asked_for(store: bool | None) -> None:
    assert read(store=store).repeated["store"] is False


def test_a_form_and_tools_are_read_side_by_side() -> None:
    function = {"type": "function", "name": "f", "parameters": SCHEMA}
    form = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    found = read(tools=[function], text=form)
    assert found.chat.parameters.grammar == Grammar(kind="json", value=SCHEMA)
    assert [tool.name for tool in found.chat.tools] == ["f"]
    assert found.repeated["tools"][0]["strict"] is True


def test_reasoning_of_earlier_turns_comes_back_as_what_the_model_thought() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
    messages = read(input=[{"role": "user", "content": "x"}, thought, said]).chat.messages
    assert messages[-1] == Message(role="assistant", content="yes", reasoning_content="hm")


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "prompt", "background"])
def test_what_needs_a_store_is_refused_by_name(name: str) -> None:
    with pytest.raises(ServiceError) as refused:
        read(**{name: True if name == "background" else "x"} if name != "prompt" else {name: {}})
    assert refused.value.field == name


def test_a_message_is_read_like_a_body() -> None:
    value = pb.ResponsesRequest.from_dict({"input": "hi", "maxOutputTokens": 3, "topP": 1.0})
    assert request_of_message(value).chat == read(max_output_tokens=3, top_p=1.0).chat
