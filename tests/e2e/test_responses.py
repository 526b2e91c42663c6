"""POST /v1/responses with OpenAI's SDK, in raw events and over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack
from tests.e2e.tools import TOOLS, WEATHER_QUESTION

PATH = "/v1/responses"
FUNCTIONS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
GREEDY: dict[str, Any] = {"model": "tgi", "temperature": 0.0}
WEATHER: dict[str, Any] = {"input": WEATHER_QUESTION, "tools": FUNCTIONS, "temperature": 0.0}
FAILING_TEMPERATURE = 1e-45  # logits become infinite


class City(BaseModel):
    """What an answer is parsed into."""

    city: str


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    url = f"{stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


def posted(stack: Stack, **body: Any) -> dict[str, Any]:
    reply = stack.http.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    result: dict[str, Any] = reply.json()
    return result


def streamed(stack: Stack, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose names are those in their data."""
    reply = stack.http.post(PATH, json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in reply.text.removesuffix("\n\n").split("\n\n") if block != ":"]
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def chat_text(stack: Stack, messages: list[dict[str, Any]], **more: Any) -> str:
    body = {"messages": messages, "temperature": 0.0, "max_tokens": 100, **more}
    reply = stack.http.post("/v1/chat/completions", json=body).json()
    text: str = reply["choices"][0]["message"]["content"]
    return text


def text_of(response: dict[str, Any]) -> str:
    (message,) = (item for item in response["output"] if item["type"] == "message")
    (part,) = message["content"]
    text: str = part["text"]
    return text


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    output = [
        {k: v for k, v in x.items() if k not in ("id", "call_id")} for x in response["output"]
    ]
    usage = {k: v for k, v in response["usage"].items() if k != "input_tokens_details"}
    return {**response, "id": "", "created_at": 0, "output": output, "usage": usage}


def test_text_is_that_of_a_chat(stack: Stack, sdk: openai.OpenAI) -> None:
    expected = chat_text(stack, [{"role": "user", "content": PROMPT}])
    response = sdk.responses.create(input=PROMPT, metadata={"a": "b"}, store=True, **GREEDY)
    assert response.output_text == expected
    assert (response.status, response.error, response.incomplete_details) == (
        "completed",
        None,
        None,
    )
    assert response.metadata == {"a": "b"}
    assert response.model_dump()["store"] is False
    usage = response.usage
    assert usage is not None
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_stream_helper_gives_the_same_text(sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(input=PROMPT, **GREEDY)
    with sdk.responses.stream(input=PROMPT, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert len(deltas) > 1


def test_text_is_parsed_into_a_model(sdk: openai.OpenAI) -> None:
    wanted: Any = {"input": WEATHER_QUESTION, "text_format": City, **GREEDY}
    assert sdk.responses.parse(**wanted).output_parsed == City(city="Paris")
    with sdk.responses.stream(**wanted) as stream:
        assert stream.get_final_response().output_parsed == City(city="Paris")


def test_conversation_with_a_tool(stack: Stack, sdk: openai.OpenAI) -> None:
    history: Any = [{"role": "user", "content": WEATHER_QUESTION}]
    asked = sdk.responses.create(input=history, tools=FUNCTIONS, **GREEDY)
    (call,) = asked.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"location": "Paris"})
    output = json.dumps({"temperature": 20, "unit": "C"})
    history += [call, {"type": "function_call_output", "call_id": call.call_id, "output": output}]
    answer = sdk.responses.create(input=history, tools=FUNCTIONS, **GREEDY)
    assert "20" in answer.output_text
    function = {"name": call.name, "arguments": call.arguments}
    calls = [{"id": call.call_id, "type": "function", "function": function}]
    turns = [
        {"role": "user", "content": WEATHER_QUESTION},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": output, "tool_call_id": call.call_id},
    ]
    assert answer.output_text == chat_text(stack, turns, tools=TOOLS)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "get_time"}, "none", "auto"]
)
def test_choice_of_a_tool(stack: Stack, choice: Any) -> None:
    response = posted(stack, **WEATHER, tool_choice=choice, max_output_tokens=60)
    names = [item.get("name") for item in response["output"]]
    assert response["tool_choice"] == choice
    if choice == "none":
        assert names == [None]
    else:
        assert names == ["get_time" if isinstance(choice, dict) else "get_weather"]


def test_instructions_and_parts_are_turns_of_a_chat(stack: Stack) -> None:
    start, end = PROMPT[:7], PROMPT[7:]
    parts = [{"type": "input_text", "text": start}, {"type": "input_text", "text": end}]
    items = [
        {"type": "message", "role": "developer", "content": "Answer shortly."},
        {"role": "user", "content": "Hello"},
        {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": parts},
    ]  # fmt: skip
    response = posted(stack, input=items, instructions="Be kind.", temperature=0.0)
    turns = [("system", "Be kind."), ("developer", "Answer shortly."), ("user", "Hello"),
             ("assistant", "Hi"), ("user", PROMPT)]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text_of(response) == chat_text(stack, messages, max_tokens=500)
    assert response["instructions"] == "Be kind."


def test_a_text_that_is_cut_is_incomplete(stack: Stack, sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(input=PROMPT, max_output_tokens=3, **GREEDY)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, item, last = streamed(stack, input=PROMPT, max_output_tokens=3, temperature=0.0)
    assert item["item"]["status"] == "incomplete"
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_a_call_that_is_cut_is_never_done(stack: Stack) -> None:
    wanted = {**WEATHER, "tool_choice": "required", "max_output_tokens": 14}
    events = streamed(stack, **wanted)
    kinds = [event["type"] for event in events]
    assert "response.function_call_arguments.done" not in kinds
    assert kinds[-2:] == ["response.output_item.done", "response.incomplete"]
    (item,) = events[-1]["response"]["output"]
    assert item["status"] == "incomplete"
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert item["arguments"] == "".join(deltas)
    assert without_ids(posted(stack, **wanted)) == without_ids(events[-1]["response"])


@pytest.mark.parametrize(
    "wanted",
    [
        {"input": PROMPT, "temperature": 0.0},
        {"input": PROMPT, "temperature": 0.0, "top_logprobs": 2, "max_output_tokens": 9},
        WEATHER,
    ],
    ids=["text", "logprobs", "call"],
)
def test_events_have_their_order_and_make_the_response(
    stack: Stack, wanted: dict[str, Any]
) -> None:
    events = streamed(stack, **wanted)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2] == "response.output_item.done"
    final = events[-1]["response"]
    assert without_ids(final) == without_ids(posted(stack, **wanted))
    assert [e["item"] for e in events if e["type"].endswith("item.done")] == final["output"]
    deltas = "".join(event.get("delta", "") for event in events)
    (item,) = final["output"]
    if item["type"] == "message":
        assert kinds[3] == "response.content_part.added"
        assert kinds[-4:-2] == ["response.output_text.done", "response.content_part.done"]
        assert deltas == events[-4]["text"] == item["content"][0]["text"]
    else:
        assert kinds[-3] == "response.function_call_arguments.done"
        assert deltas == events[-3]["arguments"] == item["arguments"]


def test_logprobs_are_those_of_the_text(stack: Stack) -> None:
    include = ["message.output_text.logprobs"]
    bare = posted(stack, input=PROMPT, temperature=0.0, include=include, max_output_tokens=5)
    (part,) = bare["output"][0]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(entry["top_logprobs"] == [] for entry in part["logprobs"])
    tops = posted(stack, input=PROMPT, temperature=0.0, top_logprobs=3, max_output_tokens=5)
    (part,) = tops["output"][0]["content"]
    for entry in part["logprobs"]:
        assert len(entry["top_logprobs"]) == 3
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == max(other["logprob"] for other in entry["top_logprobs"])


def test_a_stream_that_fails_says_so_last(stack: Stack, sdk: openai.OpenAI) -> None:
    *_, error, failed = streamed(stack, input=PROMPT, temperature=FAILING_TEMPERATURE)
    assert (error["type"], error["code"]) == ("error", "generation")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": error["code"], "message": error["message"]}
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.responses.create(model="m", input=PROMPT, temperature=FAILING_TEMPERATURE)
    assert (refused.value.status_code, refused.value.code) == (424, "generation")


def test_values_that_a_stream_cannot_have_are_named(stack: Stack) -> None:
    *_, error, failed = streamed(stack, input=PROMPT, max_output_tokens=1_000_000)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_output_tokens")
    assert failed["type"] == "response.failed"


def test_integers_of_any_size_come_back_in_tools(stack: Stack) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2**70}}}
    tools = [{"type": "function", "name": "f", "parameters": schema}]
    response = posted(stack, input=PROMPT, tools=tools, max_output_tokens=1)
    assert response["tools"][0]["parameters"] == schema


def test_reasoning_is_an_item_of_its_own(thinking: Stack) -> None:
    cut = streamed(thinking, input=PROMPT, temperature=0.0, max_output_tokens=6)
    kinds = [event["type"] for event in cut]
    assert "response.reasoning_text.delta" in kinds
    assert "response.output_text.delta" not in kinds
    (item,) = cut[-1]["response"]["output"]
    assert (item["type"], item["status"], item["summary"]) == ("reasoning", "incomplete", [])
    deltas = [event["delta"] for event in cut if event["type"].endswith("reasoning_text.delta")]
    assert item["content"] == [{"type": "reasoning_text", "text": "".join(deltas)}]
    usage = cut[-1]["response"]["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == usage["output_tokens"] == 6


def test_reasoning_of_the_input_reaches_the_template(thinking: Stack) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [],
               "content": [{"type": "reasoning_text", "text": "a long thought " * 5}]}  # fmt: skip
    turns = [
        {"role": "user", "content": "Hello"},
        thought,
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": PROMPT},
    ]
    asked = {"max_output_tokens": 1, "temperature": 0.0}
    with_thought = posted(thinking, input=turns, **asked)["usage"]["input_tokens"]
    del turns[1]
    assert with_thought > posted(thinking, input=turns, **asked)["usage"]["input_tokens"] + 10


def test_effort_reaches_the_template(thinking: Stack) -> None:
    asked = {"input": PROMPT, "max_output_tokens": 1}
    plain = posted(thinking, **asked)["usage"]["input_tokens"]
    response = posted(thinking, **asked, reasoning={"effort": "low", "summary": "auto"})
    assert response["usage"]["input_tokens"] > plain
    assert response["reasoning"] == {"effort": "low", "summary": "auto"}


def test_typed_callers_get_the_same(api: ReflectionClient, stack: Stack) -> None:
    (reply,) = api.collect("Responses", {**WEATHER, "metadata": {"a": "b"}})
    response = as_dict(reply)["response"]
    rest = posted(stack, **WEATHER)
    (call,) = response["output"]
    assert call["arguments"] == rest["output"][0]["arguments"]
    assert (response["status"], response["metadata"]) == ("completed", {"a": "b"})
    assert int(response["usage"]["output_tokens"]) == rest["usage"]["output_tokens"]
    events = [as_dict(m)["event"] for m in api.collect("Responses", {**WEATHER, "stream": True})]
    assert [e["type"] for e in events] == [e["type"] for e in streamed(stack, **WEATHER)]
    text = [as_dict(m)["event"] for m in api.collect("Responses", {
        "input": [{"role": "user", "content": PROMPT}], "temperature": 0.0, "stream": True,
    })]  # fmt: skip
    expected = text_of(posted(stack, input=PROMPT, temperature=0.0))
    assert "".join(event.get("delta", "") for event in text) == expected
    assert text[-1]["response"]["output"][0]["content"][0]["text"] == expected


def test_typed_failures_are_statuses(api: ReflectionClient) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        api.collect("Responses", {"input": PROMPT, "temperature": -1.0, "stream": True})
    assert details(refused.value) == ("validation", "temperature")
    with pytest.raises(grpc.RpcError) as refused:
        api.collect("Responses", {"input": [{"type": "item_reference", "id": "x"}]})
    assert details(refused.value) == ("validation", "input[0]")
    with pytest.raises(grpc.RpcError) as refused:
        api.collect("Responses", {})
    assert details(refused.value) == ("validation", "input")
