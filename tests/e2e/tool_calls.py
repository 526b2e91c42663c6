"""Conversations with tools, and what is read from their answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.e2e.contract import DONE, events
from tests.e2e.stack import Stack
from tests.e2e.tools import TOOLS, WEATHER_QUESTION

HEADER = "x-tool-call-format"  # chooses the form of calls
QUESTION: Any = [{"role": "user", "content": WEATHER_QUESTION}]
WANTED: dict[str, Any] = {
    "messages": QUESTION,
    "tools": TOOLS,
    "max_tokens": 100,
    "temperature": 0.0,
}
CALL = {"name": "get_weather", "arguments": {"location": "Paris"}}
OPENAI_CALL = {"name": "get_weather", "arguments": '{"location": "Paris"}'}
RESULT = json.dumps({"temperature": 20, "conditions": "sunny"})
# The same arguments as an object and in two spellings as text.
ARGUMENTS: list[Any] = [{"location": "Paris"}, '{"location": "Paris"}', ' {"location":"Paris"}']


def post(stack: Stack, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    """Sends `WANTED` with changes to the chat path."""
    body = {**WANTED, **changes}
    reply = stack.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def choice(reply: httpx.Response) -> dict[str, Any]:
    """The only choice of an answer."""
    (result,) = reply.json()["choices"]
    return dict(result)


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    """The choice of each chunk of a stream."""
    *payloads, done = events(reply)
    assert done == DONE
    return [json.loads(payload)["choices"][0] for payload in payloads]


def called(message: dict[str, Any]) -> dict[str, Any]:
    """The only call of an answer: its name, and its arguments as an object."""
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {"name": call["function"]["name"], "arguments": arguments}


def streamed_call(stream: list[dict[str, Any]]) -> tuple[str, str]:
    """The call of a stream in the form of TGI: its name, and the text of its arguments."""
    calls = [item["delta"]["tool_calls"] for item in stream if "tool_calls" in item["delta"]]
    names = [call["function"]["name"] for call in calls]
    assert names[1:] == [None] * (len(names) - 1)
    assert {(call["index"], call["id"], call["type"]) for call in calls} == {(0, "0", "function")}
    return names[0], "".join(call["function"]["arguments"] for call in calls)


def templated(stack: Stack, **changes: Any) -> str:
    """The prompt that the chat template makes of `WANTED` with changes."""
    reply = stack.http.post("/chat_tokenize", json={**WANTED, **changes})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["templated_text"])


def answered(arguments: Any) -> list[dict[str, Any]]:
    """A conversation with a call and the result of the tool; the answer is missing."""
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
    ]
