"""Tool calls in the form of the model's template, over both faces, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.native_models import HERMES, model_with
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import DEADLINE_S, Stack, running
from tests.e2e.tool_calls import HEADER, WANTED, choice, chunks, post, templated
from tests.e2e.tools import TOOLS

NAMES = {item["function"]["name"] for item in TOOLS}
ONE = {"tool_choice": {"type": "function", "function": {"name": "get_time"}}}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server whose template describes `<tool_call>`."""
    directory = tmp_path_factory.mktemp("hermes")
    model = model_with(directory / "model", HERMES)
    with running(directory / "log", f"--model-id={model}") as server:
        yield server


def assembled(stream: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a stream in OpenAI's form."""
    calls: dict[int, list[str]] = {}
    for item in stream:
        for call in item["delta"].get("tool_calls", []):
            made = calls.setdefault(call["index"], [call["function"].get("name", ""), ""])
            made[1] += call["function"]["arguments"]
    return [(name, arguments) for name, arguments in calls.values()]


def made(message: dict[str, Any]) -> list[tuple[str, str]]:
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


@pytest.mark.parametrize("wanted", [ONE, {"tool_choice": "required", "parallel_tool_calls": False}])
def test_a_forced_call_is_read_from_the_form_of_the_template(
    hermes: Stack, wanted: dict[str, Any]
) -> None:
    answer = choice(post(hermes, **wanted))
    ((name, arguments),) = made(answer["message"])
    assert name in NAMES
    assert isinstance(json.loads(arguments), dict)
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == "tool_calls"
    stream = chunks(post(hermes, stream=True, **wanted))
    assert assembled(stream) == [(name, arguments)]
    assert not any(item["delta"].get("content") for item in stream)
    assert stream[-1]["finish_reason"] == "tool_calls"


def test_arguments_have_all_that_is_required_and_no_more(hermes: Stack) -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    inner = {"type": "object", "properties": {"x": digit}, "required": ["x"]}
    given = {"type": "object", "properties": {"a": inner}, "required": ["a", "b"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": given}}]
    answer = choice(post(hermes, tools=tools, tool_choice="required", parallel_tool_calls=False))
    ((_, arguments),) = made(answer["message"])
    assert json.loads(arguments).keys() == {"a", "b"}
    assert json.loads(arguments)["a"].keys() == {"x"}


def test_what_cannot_be_enforced_is_named_with_its_function(hermes: Stack) -> None:
    given = {"type": "object", "properties": {"a": {"enum": [2**53 + 1]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": given}}]
    reply = hermes.http.post("/v1/chat/completions", json={**WANTED, "tools": tools})
    place = "at #/properties/a/enum/0 of the parameters of f"
    assert reply.status_code == 422
    assert reply.json()["error"].endswith(f"{2**53 + 1} cannot be enforced exactly, {place}")


def test_several_calls_have_numbers_and_ids_of_their_own(hermes: Stack) -> None:
    # Whoever may not end goes on with another call, until the tokens are used up.
    wanted = {"tool_choice": "required", "max_tokens": 120, "logit_bias": {"2": -100}}
    answer = choice(post(hermes, **wanted))
    assert assembled(chunks(post(hermes, stream=True, **wanted))) == made(answer["message"])
    ids = [call["id"] for call in answer["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) >= 2
    alone = choice(post(hermes, **wanted, parallel_tool_calls=False))
    assert made(alone["message"]) == made(answer["message"])[:1]
    contract = choice(post(hermes, {HEADER: "tgi"}, **wanted))["message"]["tool_calls"]
    assert [call["id"] for call in contract] == [str(index) for index in range(len(ids))]


def test_grpc_callers_get_the_same_call(hermes: Stack) -> None:
    api = ReflectionClient(hermes.direct)
    (reply,) = api.collect("Chat", {**WANTED, **ONE})
    (call,) = reply.completion.choices[0].message.tool_calls
    expected = made(choice(post(hermes, **ONE))["message"])
    assert [(call.function.name, call.function.arguments.string_value)] == expected
    replies = api.collect("Chat", {**WANTED, **ONE, "stream": True})
    deltas = [call for item in replies for call in item.chunk.choices[0].delta.tool_calls]
    arguments = "".join(call.function.arguments.string_value for call in deltas)
    assert [(deltas[0].function.name, arguments)] == expected


def test_openai_reads_the_calls(hermes: Stack) -> None:
    with OpenAI(base_url=f"{hermes.url}/v1", api_key="-", timeout=DEADLINE_S) as client:
        wanted: Any = {**WANTED, **ONE, "model": "tgi"}
        with client.chat.completions.stream(**wanted) as stream:
            (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.name == "get_time"
    assert isinstance(json.loads(call.function.arguments), dict)


@pytest.mark.parametrize("max_tokens", [1, 3, 8, 14, 20])
def test_a_call_that_is_cut_off_is_the_same_whole_and_streamed(
    hermes: Stack, max_tokens: int
) -> None:
    wanted = {**ONE, "max_tokens": max_tokens}
    answer = choice(post(hermes, **wanted))
    stream = chunks(post(hermes, stream=True, **wanted))
    assert not answer["message"]["content"]
    assert not any(item["delta"].get("content") for item in stream)
    called = answer["message"].get("tool_calls", [])
    assert assembled(stream) == [
        (call["function"]["name"], call["function"]["arguments"]) for call in called
    ]
    assert answer["finish_reason"] == stream[-1]["finish_reason"]


def test_a_flag_says_another_form(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", HERMES)
    flags = (f"--model-id={model}", "--tool-call-parser=tokenwire")
    with running(tmp_path / "log", *flags) as server:
        assert '{"_name"' not in templated(server)
        answer = choice(post(server, **ONE))
        ((name, arguments),) = made(answer["message"])
        assert (name, answer["finish_reason"]) == ("get_time", "tool_calls")
        assert isinstance(json.loads(arguments), dict)
