"""Conversations: from messages to a prompt, and from generated text to an answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generator import Generation, Token, TokenEvent
from ..generation.json_values import count_values
from ..generation.limits import Limits, check_count
from ..generation.parameters import Parameters
from ..generation.server_info import ServerInfo
from ..grammar.spec import Grammar
from ..text.tokenizer import TextTokenizer
from . import tool_calls
from .tool_calls import CallReader, ToolCall, ToolCallDelta
from .tools import Tool, Toolbox
from .usage import Usage

# The form of calls in answers: the contract's, or the one that OpenAI's clients expect.
ToolCallFormat = Literal["tgi", "openai"]
# What this endpoint calls the fields of `/generate`; the others have the same names.
_FIELD_NAMES = {
    "inputs": "messages",
    "parameters.max_new_tokens": "max_tokens",
    "parameters.min_new_tokens": "min_tokens",
    "parameters.repetition_penalty": "presence_penalty",
    "parameters.top_n_tokens": "top_logprobs",
    "parameters.grammar": "response_format",
    "parameters.grammar.type": "response_format.type",
    "parameters.grammar.value": "response_format.value",
}
_TOOL_CALL_HEADER = "x-tool-call-format"
_OPENAI_HEADER = "x-stainless-lang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn as received: `content` is a string, a list of parts, or None with tool calls."""

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
    tools: tuple[Tool, ...] = ()
    tool_choice: Any = None
    tool_prompt: str | None = None
    tool_call_format: ToolCallFormat = "tgi"
    response_format: Grammar | None = None
    include_usage: bool = False

    def check(self, limits: Limits) -> None:
        """Checks what only conversations have.

        Raises:
            ServiceError: the request is malformed, or asks for what the server does not do.
        """
        self._check_arguments(limits.max_request_values)
        if not self.messages:
            raise missing_field("messages")
        if self.n is not None and self.n != 1:
            raise ServiceError(ErrorKind.VALIDATION, f"`n` must be 1. Given: {self.n}", field="n")
        if self.response_format is not None and self.tools:
            raise ServiceError(
                ErrorKind.GRAMMAR_AND_TOOLS, "Grammar and tools are mutually exclusive"
            )

    def _check_arguments(self, max_values: int) -> None:
        """Checks the arguments of calls that are texts, which a template may want as values.

        Raises:
            ServiceError: there are too many values in all of them together.
        """
        count = 0
        for index, message in enumerate(self.messages):
            for number, call in enumerate(message.tool_calls):
                arguments = call["function"]["arguments"]
                if isinstance(arguments, str):
                    count += count_values(arguments.encode(errors="replace"))
                field = f"messages[{index}].tool_calls[{number}].function.arguments"
                check_count(field, count, max_values, "JSON values")

    @property
    def field_names(self) -> dict[str, str]:
        """What this endpoint calls the fields of `/generate`, where the names differ."""
        return {**_FIELD_NAMES, "parameters.grammar": "tools"} if self.tools else _FIELD_NAMES

    def with_toolbox(self, toolbox: Toolbox | None) -> ChatRequest:
        """The same request, in which only these tools can be called."""
        if toolbox is None:
            return replace(self, tools=())
        parameters = replace(self.parameters, grammar=toolbox.grammar())
        return replace(self, tools=toolbox.tools, parameters=parameters)

    def template_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates expect it.

        Raises:
            ServiceError: a message has no role or a content of the wrong shape.
        """
        return [_template_message(index, item) for index, item in enumerate(self.messages)]


@dataclass(frozen=True, slots=True)
class Draft:
    """What the model's template makes a prompt of, and the request with its tools in force."""

    request: ChatRequest
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    @classmethod
    def of(cls, request: ChatRequest, tokenizer: TextTokenizer, limits: Limits) -> Draft:
        """Chooses the tools.

        Raises:
            ServiceError: the request is malformed.
        """
        request.check(limits)
        toolbox = Toolbox.choose(request.tools, request.tool_choice)
        request = request.with_toolbox(toolbox)
        messages = request.template_messages()
        tools: list[dict[str, Any]] | None = None
        if toolbox is not None:
            if tokenizer.template_takes_tools:
                tools = [tool.definition() for tool in toolbox.tools]
            if tools is None or request.tool_prompt is not None:
                messages[-1]["content"] += toolbox.prompt(request.tool_prompt)
        return cls(request, messages, tools)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that can be continued: the request with its tools in force, and the prompt."""

    request: ChatRequest
    prompt: str

    @classmethod
    def of(cls, request: ChatRequest, tokenizer: TextTokenizer, limits: Limits) -> Conversation:
        """Chooses the tools, and puts messages and tools into the model's chat template.

        Raises:
            ServiceError: the request is malformed, or the template refuses it.
        """
        draft = Draft.of(request, tokenizer, limits)
        return cls(draft.request, tokenizer.render_chat(draft.messages, draft.tools))


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
            json.dumps(arguments, ensure_ascii=False).encode()  # fails for half a surrogate pair
        except (ValueError, RecursionError):
            return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A whole answer: a text or a call. `created` is seconds since 1970.

    A finished call has the finish reason `tool_calls`, whatever ended its text.
    """

    server: ServerInfo
    created: int
    text: str
    call: ToolCall | None = None
    call_id: str = ""
    tool_call_format: ToolCallFormat = "tgi"
    finish_reason: str
    matched_stop: str | int | None = None
    logprobs: list[tuple[Token, list[Token]]] | None
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """A part of an answer: of its text or of its call. The last one has the whole generation."""

    server: ServerInfo
    created: int
    is_first: bool = True
    text: str
    call: ToolCallDelta | None = None
    call_id: str = ""
    tool_call_format: ToolCallFormat = "tgi"
    finish_reason: str | None
    generation: Generation | None = None
    logprobs: list[tuple[Token, list[Token]]] | None


def answer(
    request: ChatRequest, generation: Generation, server: ServerInfo, created: int
) -> ChatAnswer:
    """The answer that a generation makes."""
    tops = generation.top_tokens or [[] for _ in generation.tokens]
    call = tool_calls.parse(generation.text) if request.tools else None
    return ChatAnswer(
        server=server,
        created=created,
        text=generation.text,
        call=call,
        call_id=_new_call_id(request.tool_call_format) if call is not None else "",
        tool_call_format=request.tool_call_format,
        finish_reason="tool_calls" if call is not None else generation.finish_reason,
        matched_stop=generation.matched_stop,
        logprobs=list(zip(generation.tokens, tops, strict=True)) if request.logprobs else None,
        usage=Usage.of([generation]),
    )


class ChatStream:
    """Turns the tokens of an answer into its parts.

    A text has one part per token, which is empty for a control token. A call has a part with its
    name first and then parts with its arguments; tokens of the envelope have no part.
    """

    def __init__(self, request: ChatRequest, server: ServerInfo, created: int) -> None:
        self._request = request
        self._server = server
        self._created = created
        self._reader = CallReader() if request.tools else None
        self._call_id = _new_call_id(request.tool_call_format)
        self._logprobs: list[tuple[Token, list[Token]]] = []
        self._is_first = True

    def push(self, event: TokenEvent) -> list[ChatDelta]:
        """The parts that a token adds; the last of them has its log-probability."""
        self._logprobs.append((event.token, event.top_tokens))
        text = "" if event.token.special else event.token.text
        parts = self._parts(text, is_last=event.generation is not None)
        if event.generation is not None:
            reason = self._finish(event.generation)
            if len(parts) == 1 and parts[0].call is None:
                parts[0] = replace(parts[0], finish_reason=reason)
            else:
                parts.append(self._delta("", finish_reason=reason))
            parts[-1] = replace(parts[-1], generation=event.generation)
        if parts and self._request.logprobs:
            parts[-1] = replace(parts[-1], logprobs=self._logprobs)
            self._logprobs = []
        return parts

    def _parts(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        reader = self._reader
        if reader is None:
            return [self._delta(text)]
        calls = reader.push(text)
        if reader.is_text or (is_last and not reader.is_named):
            self._reader = None
            return [self._delta(reader.take_text())]
        return [self._delta("", call=call) for call in calls]

    def _finish(self, generation: Generation) -> str:
        is_call = self._reader is not None and self._reader.is_complete
        return "tool_calls" if is_call else generation.finish_reason

    def _delta(
        self, text: str, call: ToolCallDelta | None = None, finish_reason: str | None = None
    ) -> ChatDelta:
        is_first, self._is_first = self._is_first, False
        return ChatDelta(
            server=self._server,
            created=self._created,
            is_first=is_first,
            text=text,
            call=call,
            call_id=self._call_id,
            tool_call_format=self._request.tool_call_format,
            finish_reason=finish_reason,
            logprobs=None,
        )


def tool_call_format(
    setting: str, metadata: Mapping[str, str], tools: Sequence[Tool]
) -> ToolCallFormat:
    """The form of calls: the caller's header decides, else the server's setting.

    With `auto` the request decides: who defines tools by OpenAI's key reads OpenAI's form, and all
    others the contract's. OpenAI's own SDKs, known by a header, can read OpenAI's only.

    Raises:
        ServiceError: the header has another value.
    """
    wanted = metadata.get(_TOOL_CALL_HEADER, setting)
    if wanted == "auto":
        by_parameters = bool(tools) and not any(tool.by_contract for tool in tools)
        return "openai" if by_parameters or _OPENAI_HEADER in metadata else "tgi"
    if wanted == "openai":
        return "openai"
    if wanted == "tgi":
        return "tgi"
    raise ServiceError(
        ErrorKind.VALIDATION,
        f"the header `{_TOOL_CALL_HEADER}` must be `tgi`, `openai` or `auto`. Given: {wanted}",
        field=_TOOL_CALL_HEADER,
    )


def _new_call_id(tool_call_format: ToolCallFormat) -> str:
    """A call's id: unique for OpenAI's clients, and "0" as in TGI for TGI's."""
    return f"call_{secrets.token_hex(12)}" if tool_call_format == "openai" else "0"
