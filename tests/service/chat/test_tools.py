"""Calls of tools in a conversation: read of streams, returned by who types, kept and forgotten."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from service.chat.answer import ChatError, Piece, piece
from service.chat.calls import Call, CallPart, whole_calls
from service.chat.conversation import Conversation
from service.chat.screen import Screen
from service.chat.session import Session
from service.chat.tools import read_tools
from tests.service.chat.fakes import FakeServer, talk

WEATHER = {"type": "function", "function": {"name": "get_weather"}}
TIME = {"type": "function", "function": {"name": "get_time"}}


def calling(*names: str) -> list[Piece | ChatError]:
    """An answer that calls these tools."""
    parts = [
        Piece(calls=(CallPart(index, f"id_{name}", name, "{}"),))
        for index, name in enumerate(names)
    ]
    return [*parts, Piece(finish_reason="tool_calls")]


def saying(text: str) -> list[Piece | ChatError]:
    """An answer in words."""
    return [Piece(text=text, finish_reason="stop")]


def roles(request: dict[str, Any]) -> list[str]:
    """Who has spoken."""
    return [message["role"] for message in request["messages"]]


def delta(**call: Any) -> dict[str, Any]:
    """A part of an answer with a part of a call."""
    return {"choices": [{"delta": {"content": None, "tool_calls": [call]}}]}


def test_calls_are_put_together_of_the_parts_of_a_stream() -> None:
    stream = [
        delta(index=0, id="a", type="function", function={"name": "f", "arguments": ""}),
        delta(index=0, function={"arguments": '{"x": '}),
        delta(index=0, id="a", function={"arguments": "1}"}),
        delta(index=1, id="b", function={"name": "g", "arguments": "{}"}),
    ]
    parts = [part for chunk in stream for part in piece(chunk).calls]
    assert whole_calls(parts) == [Call("a", "f", '{"x": 1}'), Call("b", "g", "{}")]


def test_typed_results_are_sent_with_the_ids_of_their_calls() -> None:
    server = FakeServer(calling("get_weather", "get_time"), saying("Sunny at noon."))
    out, notes = talk(server, Conversation(tools=[WEATHER, TIME]), "Weather?", "sunny", "12:00")
    assert out == "Sunny at noon.\n"
    assert notes.splitlines() == ["get_weather {}", "get_time {}"]
    first, second = server.requests
    assert first["tools"] == second["tools"] == [WEATHER, TIME]
    asked, called, *returned = second["messages"]
    assert asked == {"role": "user", "content": "Weather?"}
    assert called == {
        "role": "assistant",
        "tool_calls": [
            Call("id_get_weather", "get_weather", "{}").message,
            Call("id_get_time", "get_time", "{}").message,
        ],
    }
    assert returned == [
        {"role": "tool", "tool_call_id": "id_get_weather", "content": "sunny"},
        {"role": "tool", "tool_call_id": "id_get_time", "content": "12:00"},
    ]


def test_a_text_before_calls_is_shown_and_kept() -> None:
    server = FakeServer([Piece(text="Wait."), *calling("get_time")], saying("Noon."))
    out, _ = talk(server, Conversation(tools=[TIME]), "Time?", "12:00")
    assert out == "Wait.\nNoon.\n"
    assert server.requests[1]["messages"][1]["content"] == "Wait."


@pytest.mark.parametrize("choice", ["required", "get_time", {"function": {"name": "get_time"}}])
def test_who_has_to_call_may_answer_once_the_call_has_returned(choice: Any) -> None:
    conversation = Conversation(parameters={"tool_choice": choice}, tools=[TIME])
    server = FakeServer(calling("get_time"), saying("Noon."), calling("get_time"), saying("Noon."))
    talk(server, conversation, "Time?", "12:00", "Again?", "12:00")
    assert [request.get("tool_choice") for request in server.requests] == [choice, None] * 2


def test_none_stays_the_choice_when_a_call_has_returned() -> None:
    server = FakeServer(calling("get_time"), saying("Noon."))
    conversation = Conversation(parameters={"tool_choice": "none"}, tools=[TIME])
    talk(server, conversation, "Time?", "12:00")
    assert [request["tool_choice"] for request in server.requests] == ["none", "none"]


def test_regenerate_asks_the_question_again_without_its_calls() -> None:
    server = FakeServer(saying("Hi."), calling("get_time"), saying("Noon."), saying("Late."))
    talk(server, Conversation(tools=[TIME]), "Hello", "Time?", "12:00", "/regenerate")
    assert roles(server.requests[2])[-2:] == ["assistant", "tool"]
    assert roles(server.requests[3]) == ["user", "assistant", "user"]


@pytest.mark.parametrize("second", [[ChatError("full")], saying("Noon.")], ids=["error", "answer"])
def test_a_question_that_fails_after_a_call_is_forgotten_as_a_whole(
    second: list[Piece | ChatError],
) -> None:
    server = FakeServer(calling("get_time"), second, saying("Hi."))
    talk(server, Conversation(tools=[TIME]), "Time?", "12:00", "Hello")
    failed = isinstance(second[0], ChatError)
    assert roles(server.requests[2]) == (
        ["user"] if failed else ["user", "assistant", "tool", "assistant", "user"]
    )


def test_ctrl_c_in_place_of_a_result_takes_the_question_back() -> None:
    server = FakeServer(calling("get_time"), saying("Hi."))
    _, notes = talk(server, Conversation(tools=[TIME]), "Time?", KeyboardInterrupt, "Hello")
    assert "(left unanswered; the question is forgotten)" in notes
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_call_that_was_cut_is_none() -> None:
    cut: list[Piece | ChatError] = [
        Piece(calls=(CallPart(0, "a", "get_time", '{"ci'),)),
        Piece(finish_reason="length"),
    ]
    server = FakeServer(cut, saying("Hi."))
    _, notes = talk(server, Conversation(tools=[TIME]), "Time?", "Hello")
    assert notes.startswith("(cut:")
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": ""}


def test_tools_are_read_and_turned_off_and_on_in_between(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([WEATHER, TIME]))
    server = FakeServer(*[saying("Hi.")] * 4)
    lines = ["/tools on", "A", f"/tools {file}", "B", "/tools off", "C", "/tools", "/tools on", "D"]
    _, notes = talk(server, Conversation(), *lines)
    assert [request.get("tools") for request in server.requests] == [
        None,
        [WEATHER, TIME],
        None,
        [WEATHER, TIME],
    ]
    names = "get_weather, get_time"
    assert notes.splitlines() == [
        "there are no tools; /tools FILE reads some",
        f"Tools are on: {names}",
        f"Tools are off: {names}",
        f"Tools are off: {names}",
        f"Tools are on: {names}",
    ]


def test_what_is_saved_is_a_request_with_calls_and_tools(tmp_path: Path) -> None:
    server = FakeServer(calling("get_time"), saying("Noon."))
    talk(server, Conversation(tools=[TIME]), "Time?", "12:00", f"/save {tmp_path}/saved")
    saved = json.loads((tmp_path / "saved").read_text())
    assert roles(saved) == ["user", "assistant", "tool", "assistant"]
    assert saved["tools"] == [TIME]


def test_a_pipe_gets_calls_as_lines_of_json() -> None:
    parts = [
        Piece(calls=(CallPart(0, "a", "f", '{"city": "Zürich"}'), CallPart(1, "b", "g", "no"))),
        Piece(finish_reason="tool_calls"),
    ]
    out = io.StringIO()
    Session(FakeServer([*parts]), Conversation(tools=[TIME]), Screen(out)).ask_once("Time?")
    assert out.getvalue() == (
        '{"id": "a", "name": "f", "arguments": {"city": "Zürich"}}\n'
        '{"id": "b", "name": "g", "arguments": "no"}\n'
    )


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '["get_time"]', '[{"name": "f"}]', '[{"function": {"name": 1}}]']
)
def test_a_file_with_something_else_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=str(file)):
        read_tools(str(file))
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_tools(str(tmp_path / "nowhere"))
