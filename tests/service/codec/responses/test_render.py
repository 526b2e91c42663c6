"""Responses as JSON, as server-sent events and as messages say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.codec.responses import convert, render
from service.errors import ErrorKind, ServiceError
from service.generation.generation import Token
from service.openai.responses.event import Event
from service.openai.responses.item import Item
from service.openai.responses.response import Response
from service.openai.usage import Usage
from tests.service.fakes import ANSWER_HEAD, generation

TOKEN = Token(5, "é", -0.5, False)
MESSAGE = Item(
    id="msg_1", kind="message", status="completed", text="é", logprobs=((TOKEN, [TOKEN]),)
)
REASONING = Item(id="rs_1", kind="reasoning", status="completed", text="hm")
CALL = Item(id="fc_1", kind="function_call", call_id="c", name="f", arguments="{}")


def response(**changes: Any) -> Response:
    values: dict[str, Any] = {"head": ANSWER_HEAD, "repeated": {"metadata": {"a": "b"}}}
    return Response(**(values | changes))


def body(result: Response) -> Any:
    return json.loads(render.response(result))


def test_an_item_has_what_its_kind_has() -> None:
    result = response(items=(REASONING, MESSAGE, CALL), status="completed")
    reasoning, message, call = body(result)["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    (part,) = message["content"]
    assert (part["type"], part["text"]) == ("output_text", "é")
    assert part["logprobs"][0]["bytes"] == list("é".encode())
    assert (call["call_id"], call["name"], call["arguments"]) == ("c", "f", "{}")
    assert "content" not in call
    assert [item.id for item in convert.response(result).output] == ["rs_1", "msg_1", "fc_1"]


def test_an_answer_that_was_cut_says_why() -> None:
    result = response(status="incomplete", usage=Usage.of([generation()]), num_reasoning_tokens=1)
    said = body(result)
    assert said["incomplete_details"] == {"reason": "max_output_tokens"}
    assert said["usage"]["total_tokens"] == said["usage"]["input_tokens"] + 2
    assert said["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    assert convert.response(result).incomplete_reason == "max_output_tokens"
    assert body(response(status="completed"))["incomplete_details"] is None


def test_integers_of_the_request_come_back_as_they_were() -> None:
    assert (
        body(response(repeated={"tools": [{"maximum": 10**30}]}))["tools"][0]["maximum"] == 10**30
    )


def test_a_failure_is_in_the_answer_and_in_an_event_of_its_own() -> None:
    failure = ServiceError(ErrorKind.GENERATION, "it died")
    assert "it died" in body(response(status="failed", failure=failure))["error"]["message"]
    name, data = render.event(Event(type="error", number=7, failure=failure)).split(b"\n")[:2]
    said = json.loads(data.removeprefix(b"data: "))
    assert (name, said["sequence_number"]) == (b"event: error", 7)
    assert "it died" in said["message"]


@pytest.mark.parametrize(
    ("kind", "item", "fields"),
    [
        ("response.output_item.added", CALL, {"item"}),
        ("response.function_call_arguments.delta", CALL, {"item_id", "delta"}),
        ("response.function_call_arguments.done", CALL, {"item_id", "name", "arguments"}),
        ("response.content_part.done", MESSAGE, {"item_id", "content_index", "part"}),
        ("response.output_text.delta", MESSAGE, {"item_id", "content_index", "delta", "logprobs"}),
        ("response.output_text.done", MESSAGE, {"item_id", "content_index", "text", "logprobs"}),
        ("response.reasoning_text.done", REASONING, {"item_id", "content_index", "text"}),
    ],
)
def test_the_name_of_an_event_says_what_it_has(kind: str, item: Item, fields: set[str]) -> None:
    is_part = item.kind != "function_call"
    delta = "x" if kind.endswith("delta") else None
    event = Event(type=kind, number=3, output_index=1, item=item, is_part=is_part, delta=delta)
    name, data, *end = render.event(event).split(b"\n")
    assert (name, end) == (b"event: " + kind.encode(), [b"", b""])
    said = json.loads(data.removeprefix(b"data: "))
    assert said.keys() == {"type", "sequence_number", "output_index"} | fields
    message = convert.event(event)
    assert (message.type, message.sequence_number, message.output_index) == (kind, 3, 1)
