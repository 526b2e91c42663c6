"""Conversations: from messages to a prompt, and from generated text to an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .errors import ErrorKind, ServiceError, missing_field
from .generation import Generation, Token, TokenEvent
from .parameters import Grammar, Parameters
from .server_info import ServerInfo
from .usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn as it came: `content` is a string, a list of parts, or None with tool calls."""

    role: str | None
    content: Any = None
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to continue. `parameters` already has the names of `/generate`."""

    messages: tuple[Message, ...]
    parameters: Parameters
    stream: bool = False
    logprobs: bool = False
    n: int | None = None
    has_tools: bool = False
    tool_choice: Any = None
    response_format: Grammar | None = None
    include_usage: bool = False

    def check(self) -> None:
        """Checks what only conversations have.

        Raises:
            ServiceError: the request is malformed, or asks for what the server does not do.
        """
        if not self.messages:
            raise missing_field("messages")
        if self.n is not None and self.n != 1:
            raise ServiceError(ErrorKind.VALIDATION, f"`n` must be 1. Given: {self.n}", field="n")
        if self.response_format is not None and self.has_tools:
            raise ServiceError(
                ErrorKind.GRAMMAR_AND_TOOLS, "Grammar and tools are mutually exclusive"
            )
        if self.has_tools and self.tool_choice != "none":
            raise ServiceError(ErrorKind.TOOL, "tools are not supported", field="tools")

    def template_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates expect it.

        Raises:
            ServiceError: a message has no role or a content of the wrong shape.
        """
        return [_template_message(index, item) for index, item in enumerate(self.messages)]


def _template_message(index: int, message: Message) -> dict[str, Any]:
    path = f"messages[{index}]"
    if message.role is None:
        raise missing_field(f"{path}.role")
    if message.content is None and not message.tool_calls:
        raise missing_field(f"{path}.content")
    turn: dict[str, Any] = {"role": message.role, "content": _text(path, message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_calls:
        turn["tool_calls"] = [_parsed_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(path: str, content: Any) -> str:
    """The text of a message's content; parts are joined without a separator, as in TGI."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(path, part) for part in content)
    raise _bad_content(path)


def _part_text(path: str, part: Any) -> str:
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image_url":
            raise ServiceError(
                ErrorKind.VALIDATION,
                "the model takes text only; `image_url` is not supported",
                field=f"{path}.content",
            )
    raise _bad_content(path)


def _bad_content(path: str) -> ServiceError:
    return ServiceError(
        ErrorKind.SHAPE,
        f"{path}.content: data did not match any variant of untagged enum MessageContent",
        field=f"{path}.content",
    )


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI's clients send them as a string."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A whole answer. `created` is seconds since 1970."""

    server: ServerInfo
    created: int
    text: str
    finish_reason: str
    logprobs: list[tuple[Token, list[Token]]] | None
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """One token of an answer."""

    server: ServerInfo
    created: int
    text: str
    finish_reason: str | None
    logprobs: list[tuple[Token, list[Token]]] | None


def answer(
    request: ChatRequest, generation: Generation, server: ServerInfo, created: int
) -> ChatAnswer:
    """The answer that a generation makes."""
    tops = generation.top_tokens or [[] for _ in generation.tokens]
    return ChatAnswer(
        server=server,
        created=created,
        text=generation.text,
        finish_reason=generation.finish_reason,
        logprobs=list(zip(generation.tokens, tops, strict=True)) if request.logprobs else None,
        usage=Usage.of([generation]),
    )


def delta(request: ChatRequest, event: TokenEvent, server: ServerInfo, created: int) -> ChatDelta:
    """The part of an answer that a token makes; a control token adds no text."""
    return ChatDelta(
        server=server,
        created=created,
        text="" if event.token.special else event.token.text,
        finish_reason=event.generation.finish_reason if event.generation else None,
        logprobs=[(event.token, event.top_tokens)] if request.logprobs else None,
    )
