"""The events of a streamed response: their order, whatever is written and wherever it ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ErrorKind, ServiceError
from service.generation.generation import Generation, Token, TokenEvent
from service.generation.parameters import Parameters
from service.openai.call_formats.dialect import Dialect
from service.openai.call_formats.hermes import Hermes
from service.openai.chat import ChatRequest, Message
from service.openai.responses.event import Event
from service.openai.responses.request import ResponsesRequest
from service.openai.responses.stream import ResponseStream, answer
from service.openai.tools import Tool
from tests.service.fakes import ANSWER_HEAD, generation

DIALECT = Dialect(calls=Hermes(), reasoning="think")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
PARTS = [
    "<think>",
    "hm",
    "</think>",
    "\n\n",
    "hello",
    " ",
    CALL,
    CALL[:30],
    "{",
    '"',
    "<tool_call>",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
LASTS = ("response.completed", "response.incomplete", "response.failed")


def request(**changes: Any) -> ResponsesRequest:
    chat = ChatRequest(
        messages=(Message(role="user", content="x"),),
        parameters=Parameters(),
        tools=(Tool(name="f"),),
        tool_call_format="openai",
        dialect=DIALECT,
    )
    return ResponsesRequest(chat=dataclasses.replace(chat, **changes), repeated={"user": "u"})


def tokens_of(text: str, size: int) -> list[Token]:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [*(Token(9, piece, -0.5, False) for piece in pieces), Token(2, "<eos>", -0.5, True)]


def finished(tokens: list[Token], reason: str) -> Generation:
    return generation(tokens=tokens, top_tokens=[], finish_reason=reason)


def events_of(text: str, size: int, reason: str, **changes: Any) -> list[Event]:
    """The events of a text that ends for a reason, after which nothing comes."""
    stream, tokens = ResponseStream(request(**changes), ANSWER_HEAD), tokens_of(text, size)
    events = stream.begin()
    for token in tokens[:-1]:
        events += stream.push(TokenEvent(token, []))
    return [*events, *stream.push(TokenEvent(tokens[-1], [], finished(tokens, reason)))]


def check(events: list[Event]) -> None:
    """Checks the order: numbers, items one after the other, and one end."""
    assert [event.number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.type in LASTS for event in events] == [False] * (len(events) - 1) + [True]
    opened: list[str] = []  # what of the item has been added and is not done
    num_items = 0
    for event in events[2:]:
        if event.item is None:
            continue
        assert event.output_index == num_items
        *_, subject, verb = event.type.split(".")
        if verb == "added":
            assert opened == ([] if subject == "output_item" else ["output_item"])
            opened.append(subject)
        elif subject in ("output_item", "content_part"):
            assert opened.pop() == subject
            num_items += not opened
        else:
            assert opened == ["output_item", *["content_part"] * event.is_part]
    assert not opened or events[-1].type == "response.failed"


@given(TEXTS, st.integers(1, 40), st.sampled_from(["eos_token", "length", "stop_sequence"]))
def test_items_are_added_before_their_deltas_and_done_after_them(
    text: str, size: int, reason: str
) -> None:
    events = events_of(text, size, reason)
    check(events)
    is_cut = reason == "length" and events[-1].type == "response.incomplete"
    assert is_cut or events[-1].type == "response.completed"


@given(TEXTS, st.integers(1, 40), st.sampled_from(["eos_token", "length"]))
def test_deltas_make_what_the_whole_answer_has(text: str, size: int, reason: str) -> None:
    events = events_of(text, size, reason)
    tokens = tokens_of(text, size)
    whole = answer(request(), finished(tokens, reason), ANSWER_HEAD)
    last = events[-1].response
    assert last is not None
    assert [dataclasses.replace(item, call_id="") for item in last.items] == [
        dataclasses.replace(item, call_id="") for item in whole.items
    ]
    assert (last.status, last.usage) == (whole.status, whole.usage)
    for index, item in enumerate(whole.items):
        deltas = [event.delta or "" for event in events if event.output_index == index]
        assert "".join(deltas) == (item.text or item.arguments)
        assert item.kind != "function_call" or item.status in ("completed", "incomplete")


@given(TEXTS, st.integers(1, 40), st.integers(0, 200))
def test_a_failure_ends_a_stream_wherever_it_comes(text: str, size: int, num_tokens: int) -> None:
    stream = ResponseStream(request(), ANSWER_HEAD)
    events = stream.begin()
    for token in tokens_of(text, size)[:-1][:num_tokens]:
        events += stream.push(TokenEvent(token, []))
    failure = ServiceError(ErrorKind.GENERATION, "the engine died")
    events += stream.fail(failure)
    check(events)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    last = events[-1].response
    assert last is not None
    assert (last.status, last.failure) == ("failed", failure)
    assert events[-2].failure is failure


def test_a_call_that_is_cut_off_is_never_said_to_be_whole() -> None:
    events = events_of(CALL[:45], 5, "length")
    assert not any(event.type == "response.function_call_arguments.done" for event in events)
    last = events[-1].response
    assert last is not None
    (call,) = last.items
    assert (call.kind, call.status, last.status) == ("function_call", "incomplete", "incomplete")


def test_an_answer_that_says_nothing_has_an_empty_message() -> None:
    last = events_of("<think>hm</think>", 4, "eos_token")[-1].response
    assert last is not None
    assert [(item.kind, item.text) for item in last.items] == [("reasoning", "hm"), ("message", "")]
    assert last.num_reasoning_tokens > 0


@pytest.mark.parametrize("size", [1, 2])  # of tokens
def test_log_probabilities_belong_to_the_text_that_they_are_of(size: int) -> None:
    text = "<think>h</think>\n\nhello!"
    last = events_of(text, size, "eos_token", logprobs=True)[-1].response
    assert last is not None
    reasoning, message = last.items
    assert reasoning.logprobs == ()
    assert "".join(token.text for token, _ in message.logprobs).strip() == "hello!"
