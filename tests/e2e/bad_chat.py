"""Refused requests of conversations: `/v1/chat/completions` and `/chat_tokenize`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.error_texts import MAX_TOTAL
from tests.e2e.refusal import CHAT, MESSAGES, TOOLS, Row, no_number

_IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
_TEXT_PART = {"type": "text", "text": "hi"}
_SCHEMA = {"type": "json", "value": {"type": "object"}}


def _chat(
    error: str,
    field: str | None,
    error_type: str = "validation",
    body_error: str | None = None,
    **changes: Any,
) -> Row:
    body = {"messages": MESSAGES, "max_tokens": 2, **changes}
    return Row(CHAT, body, error, field, error_type, body_error=body_error)


def _content(
    content: Any, error: str = f"{texts.SHAPE}messages[0].content: {texts.UNTAGGED}"
) -> Row:
    messages = [{"role": "user", "content": content}]
    return _chat(error, "messages[0].content", messages=messages)


# The names that chat has for parameters of /generate.
_CHAT_FIELDS = {
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "presence_penalty",
    "top_n_tokens": "top_logprobs",
}


def _chat_parameter(error: str, field: str, **changes: Any) -> list[Row]:
    """A rule of one generation: refused with a status, and in a stream with an event."""
    name = _CHAT_FIELDS.get(field, field)
    row = _chat(
        texts.VALIDATION + error, name, body_error=no_number(name, changes.get(name)), **changes
    )
    return [row, replace(row, body={**row.body, "stream": True}, in_band=True)]


def _role(role: str, text: str, path: str = CHAT) -> Row:
    messages = [*MESSAGES, {"role": role, "content": "x"}]
    error = f"Template error: syntax error: {text}"
    return Row(path, {"messages": messages}, error, None, "template_error")


CHAT_ROWS = [
    _chat(f"{texts.SHAPE}missing field `messages`", "messages", messages=[]),
    _chat(f"{texts.SHAPE}missing field `messages`", "messages", messages=[], n=17, stream=True),
    # Messages of a wrong shape: the error names the first of them.
    _chat(f"{texts.SHAPE}messages[0]: missing field `role`", "messages[0].role", messages=[{}]),
    _chat(
        f"{texts.SHAPE}messages[0]: missing field `role`",
        "messages[0].role",
        body_error=f"{texts.SHAPE}messages[0].role: expected a string, got null",
        messages=[{"role": None, "content": 5}, {}],
    ),
    _chat(
        f"{texts.SHAPE}messages[1]: missing field `content`",
        "messages[1].content",
        messages=[*MESSAGES, {"role": "user"}],
    ),
    _chat(
        f"{texts.SHAPE}messages[1]: missing field `content`",
        "messages[1].content",
        messages=[*MESSAGES, {"role": "assistant", "content": None, "tool_calls": []}],
    ),
    _content(None, f"{texts.SHAPE}messages[0]: missing field `content`"),
    _content(5),
    _content(0.5),
    _content(True),
    _content({}),
    _content(_TEXT_PART),
    _content([5]),
    _content([None]),
    _content(["hi"]),
    _content([[_TEXT_PART]]),
    _content([{}]),
    _content([{"text": "hi"}]),
    _content([{"type": "text"}]),
    _content([{"type": "text", "text": 5}]),
    _content([{"type": "text", "text": None}]),
    _content([_TEXT_PART, {"type": "input_audio", "input_audio": {}}]),
    _content([_IMAGE_PART], texts.IMAGE),
    _content([_TEXT_PART, _IMAGE_PART, 5], texts.IMAGE),
    # Several choices, which the server does not make.
    _chat(texts.VALIDATION + texts.n(0), "n", n=0),
    _chat(texts.VALIDATION + texts.n(17), "n", n=17),
    _chat(texts.VALIDATION + texts.n(2**32 - 1), "n", n=2**32 - 1),
    _chat(texts.VALIDATION + texts.n(17), "n", n=17, stream=True),
    # Several faults. Checked in this order: shape, `n`, template, parameters.
    _chat(texts.VALIDATION + texts.n(17), "n", n=17, response_format=_SCHEMA, tools=TOOLS),
    _chat(texts.VALIDATION + texts.n(17), "n", n=17, messages=[{"role": "weird", "content": 5}]),
    _role("weird", "Unknown message role: weird"),
    _role("", "Unknown message role: "),
    _role("User", "Unknown message role: User"),
    _role('a "b"\n\u00fc\U0001f642', 'Unknown message role: a "b"\n\u00fc\U0001f642'),
    _chat(
        "Template error: syntax error: Unknown message role: weird",
        None,
        "template_error",
        messages=[{"role": "weird", "content": "x"}],
        temperature=-1,
        stream=True,
    ),
    # Tools that cannot be called.
    _chat(
        "Tool error: Tool with name g not found",
        "tool_choice",
        "tool_error",
        tools=TOOLS,
        tool_choice="g",
    ),
    _chat(
        "Tool error: Tool with name g not found",
        "tool_choice",
        "tool_error",
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "g"}},
        temperature=-1,
        stream=True,
    ),
    # The rules of one generation, with the texts of /generate.
    *_chat_parameter(texts.TEMPERATURE, "temperature", temperature=-1e-45),
    *_chat_parameter(texts.TEMPERATURE, "temperature", temperature="NaN"),
    *_chat_parameter(texts.REPETITION, "repetition_penalty", presence_penalty=-2),
    *_chat_parameter(texts.REPETITION, "repetition_penalty", presence_penalty="NaN"),
    *_chat_parameter(texts.FREQUENCY, "frequency_penalty", frequency_penalty=-2.0000003),
    *_chat_parameter(texts.TOP_P, "top_p", top_p=1, max_tokens=0),
    *_chat_parameter(texts.MAX_NEW, "max_new_tokens", max_tokens=0),
    *_chat_parameter(texts.MAX_NEW, "max_new_tokens", max_completion_tokens=0),
    *_chat_parameter(texts.stop(5), "stop", stop=["x"] * 5),
    *_chat_parameter(texts.top_n(6), "top_n_tokens", logprobs=True, top_logprobs=6),
    *_chat_parameter(texts.total(5, MAX_TOTAL), "max_new_tokens", max_tokens=MAX_TOTAL),
    # The other path that turns messages into a prompt.
    Row(
        "/chat_tokenize",
        {"messages": [{"role": "user", "content": [5]}]},
        f"{texts.SHAPE}messages[0].content: {texts.UNTAGGED}",
        "messages[0].content",
    ),
    Row("/chat_tokenize", {"messages": MESSAGES, "n": 17}, texts.VALIDATION + texts.n(17), "n"),
    _role("weird", "Unknown message role: weird", "/chat_tokenize"),
]
