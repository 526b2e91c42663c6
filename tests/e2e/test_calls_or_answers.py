"""Tools together with a form of the answer: calls, or answers of that form, over both faces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.e2e.grammars import check_refused
from tests.e2e.native_models import HERMES, model_with
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack, running
from tests.e2e.tool_calls import CALL, WANTED, called, choice, chunks, post
from tests.e2e.tools import TIME_QUESTION, TOOLS, WEATHER_QUESTION

LLAMA3 = HERMES.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace(
    '"arguments": <args-json-object>', '"parameters": dictionary'
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["get_time", "x"]}, "n": {"type": "boolean"}},
    "required": ["name", "n"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": json.dumps(SCHEMA)}}
TEXT = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
ARGUMENTS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
OPENAI = {"x-stainless-lang": "python"}  # whose form errors then have
FREE = {"temperature": 50.0, "max_tokens": 200}  # nearly any token that is allowed


@pytest.fixture(scope="module", params=["tokenwire", "hermes", "llama3"])
def server(
    stack: Stack, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Servers whose models write calls in several forms."""
    if request.param == "tokenwire":
        yield stack
        return
    directory = tmp_path_factory.mktemp(request.param)
    model = model_with(directory / "model", {"hermes": HERMES, "llama3": LLAMA3}[request.param])
    with running(directory / "log", f"--model-id={model}") as started:
        yield started


def said(message: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [(function["name"], function["arguments"]) for function in functions]
    return message.get("content") or "", calls


def streamed(stream: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """The same of a stream in OpenAI's form."""
    text = "".join(item["delta"].get("content") or "" for item in stream)
    calls: dict[int, list[str]] = {}
    for item in stream:
        for call in item["delta"].get("tool_calls") or ():
            made = calls.setdefault(call["index"], [call["function"].get("name") or "", ""])
            made[1] += call["function"]["arguments"]
    return text, [(name, arguments) for name, arguments in calls.values()]


def checked(text: str, calls: list[tuple[str, str]], *, is_cut: bool) -> str:
    """Whether an answer is a call or text, of which there is never both, in the right form."""
    assert not (text and calls)
    if not is_cut:
        assert text or calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), ARGUMENTS[name])
        if text:
            jsonschema.validate(json.loads(text), SCHEMA)
    return "call" if calls else "text"


def test_chat_has_calls_or_answers_whole_streamed_and_over_grpc(server: Stack) -> None:
    api = ReflectionClient(server.direct)
    kinds = set()
    for seed in range(8):
        wanted = {"response_format": FORMAT, "seed": seed, **FREE}
        answer = choice(post(server, {"x-tool-call-format": "openai"}, **wanted))
        text, calls = said(answer["message"])
        kinds.add(checked(text, calls, is_cut=answer["finish_reason"] == "length"))
        stream = chunks(post(server, {"x-tool-call-format": "openai"}, stream=True, **wanted))
        assert streamed(stream) == (text, calls)
        assert stream[-1]["finish_reason"] == answer["finish_reason"]
        # Objects of protobuf have no order, so that the prompt, and the answer, may be another.
        (reply,) = api.collect("Chat", {**WANTED, **wanted})
        (typed,) = reply.completion.choices
        functions = [call.function for call in typed.message.tool_calls]
        calls = [(function.name, function.arguments.string_value) for function in functions]
        checked(typed.message.content, calls, is_cut=typed.finish_reason == "length")
    assert kinds == {"call", "text"}


def test_responses_have_calls_or_answers_whole_and_streamed(server: Stack) -> None:
    for question in (WEATHER_QUESTION, TIME_QUESTION, "Hello!", "Who are you?"):
        wanted = {"input": question, "tools": FUNCTIONS, "text": TEXT, "temperature": 0.0}
        reply = server.http.post("/v1/responses", json={**wanted, "max_output_tokens": 200})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        items = answer["output"]
        text = "".join(i["content"][0]["text"] for i in items if i["type"] == "message")
        calls = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
        checked(text, calls, is_cut=answer["status"] == "incomplete")
        body = {**wanted, "max_output_tokens": 200, "stream": True}
        raw = server.http.post("/v1/responses", json=body).text
        last = json.loads(raw.rstrip().rpartition("data: ")[2])["response"]
        assert without_ids(last["output"]) == without_ids(items)


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def test_the_model_may_call_though_its_answers_have_a_form(stack: Stack) -> None:
    assert called(choice(post(stack, response_format=FORMAT))["message"]) == CALL


def test_a_forced_call_has_no_answers_form_and_without_tools_there_is_nothing_else(
    stack: Stack,
) -> None:
    assert called(choice(post(stack, response_format=FORMAT, tool_choice="required"))["message"])
    answer = choice(post(stack, response_format=FORMAT, tool_choice="none"))
    jsonschema.validate(json.loads(answer["message"]["content"]), SCHEMA)


def test_an_answer_that_may_begin_like_a_call_is_refused_by_name(
    stack: Stack, api: ReflectionClient
) -> None:
    body = {**WANTED, "response_format": {"type": "json_object"}}
    said = 'no answer may begin like a call, but one may with {"function": {"_name": "get_weather"'
    field = check_refused(stack, api, "/v1/chat/completions", "Chat", body, said)
    assert field == "response_format"
    wanted = {"input": "x", "tools": FUNCTIONS, "text": {"format": {"type": "json_object"}}}
    reply = stack.http.post("/v1/responses", json=wanted, headers=OPENAI)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "text.format")
    reply = stack.http.post("/v1/responses", json={**wanted, "tool_choice": "none"})
    assert reply.status_code == 200
