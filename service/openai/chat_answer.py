"""Answers to conversations, whole and token by token, made of generated text."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..generation.generation import Generation, Token, TokenEvent
from ..generation.lazy import Lazy
from .call_formats.pieces import Content, Parsed, Piece, Reasoned
from .chat import ChatRequest, ToolCallFormat
from .head import Head
from .tool_calls import ToolCall, ToolCallDelta
from .usage import Usage

Scored = Sequence[tuple[Token, Sequence[Token]]]  # tokens, each with the likeliest at its place
_END = "eos_token"  # how an answer ends that is not cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A whole answer: text and calls, after reasoning.

    Finished calls have the finish reason `tool_calls`, whatever ended their text.
    """

    head: Head
    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tool_call_format: ToolCallFormat = "tgi"
    finish_reason: str
    matched_stop: str | int | None = None
    logprobs: Scored | None
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """A part of an answer: of its text or of its call. The last one has the whole generation.

    `index` is the answer's number among those to the same conversation.
    """

    head: Head
    index: int = 0
    is_first: bool = True
    text: str
    reasoning: str = ""
    call: ToolCallDelta | None = None
    call_id: str = ""
    tool_call_format: ToolCallFormat = "tgi"
    finish_reason: str | None
    generation: Generation | None = None
    logprobs: Scored | None


def answer(request: ChatRequest, generation: Generation, head: Head) -> ChatAnswer:
    """The answer that a generation makes."""
    parsed = _parsed(request, generation)
    calls = [
        replace(call, id=_new_call_id(request.tool_call_format, index))
        for index, call in enumerate(parsed.calls)
    ]
    return ChatAnswer(
        head=head,
        text=parsed.content,
        reasoning=parsed.reasoning,
        calls=tuple(calls),
        tool_call_format=request.tool_call_format,
        finish_reason="tool_calls" if parsed.is_call else generation.finish_reason,
        matched_stop=generation.matched_stop,
        logprobs=_scored(generation) if request.logprobs else None,
        usage=Usage.of([generation]),
    )


def _scored(generation: Generation) -> Scored:
    """The tokens of a text, each with the likeliest at its place."""
    tokens, tops = generation.tokens, generation.top_tokens
    return Lazy(lambda at: (tokens[at], tops[at] if tops else []), range(len(tokens)))


def _parsed(request: ChatRequest, generation: Generation) -> Parsed:
    reader = request.reader()
    if reader is None:
        return Parsed.of([Content(generation.text)])
    pieces = reader.push("".join(map(request.answer_text, generation.tokens)))
    return Parsed.of([*pieces, *reader.finish(is_cut=generation.finish_reason != _END)])


class ChatStream:
    """Turns the tokens of an answer into its parts.

    A text has one part per token, which is empty for a control token. A call has a part with its
    name first and then parts with its arguments; tokens of the envelope have no part.
    """

    def __init__(self, request: ChatRequest, head: Head, index: int = 0) -> None:
        self._request = request
        self._head = head
        self._index = index
        self._reader = request.reader()
        self._call_ids: list[str] = []
        self._num_complete = 0
        self._logprobs: list[tuple[Token, Sequence[Token]]] = []
        self._is_first = True

    def push(self, event: TokenEvent) -> list[ChatDelta]:
        """The parts that a token adds; the last of them has its log-probability."""
        self._logprobs.append((event.token, event.top_tokens))
        parts = self._parts(event)
        if event.generation is not None:
            reason = self._finish(event.generation)
            if len(parts) == 1 and parts[0].call is None:
                parts[0] = replace(parts[0], finish_reason=reason)
            else:
                parts.append(self._delta(finish_reason=reason))
            parts[-1] = replace(parts[-1], generation=event.generation)
        if parts and self._request.logprobs:
            parts[-1] = replace(parts[-1], logprobs=self._logprobs)
            self._logprobs = []
        return parts

    def _parts(self, event: TokenEvent) -> list[ChatDelta]:
        reader, token = self._reader, event.token
        if reader is None:
            return [self._delta(text="" if token.special else token.text)]
        pieces = reader.push(self._request.answer_text(token))
        if event.generation is not None:
            pieces += reader.finish(is_cut=event.generation.finish_reason != _END)
        return [self._part(piece) for piece in pieces]

    def _part(self, piece: Piece) -> ChatDelta:
        match piece:
            case Content(text):
                return self._delta(text=text)
            case Reasoned(text):
                return self._delta(reasoning=text)
        self._num_complete += piece.is_end
        if piece.name is not None:
            call_format = self._request.tool_call_format
            self._call_ids.append(_new_call_id(call_format, len(self._call_ids)))
        return self._delta(call=piece)

    def _finish(self, generation: Generation) -> str:
        is_call = self._num_complete == len(self._call_ids) > 0
        return "tool_calls" if is_call else generation.finish_reason

    def _delta(
        self,
        *,
        text: str = "",
        reasoning: str = "",
        call: ToolCallDelta | None = None,
        finish_reason: str | None = None,
    ) -> ChatDelta:
        is_first, self._is_first = self._is_first, False
        return ChatDelta(
            head=self._head,
            index=self._index,
            is_first=is_first,
            text=text,
            reasoning=reasoning,
            call=call,
            call_id=self._call_ids[-1] if call is not None else "",
            tool_call_format=self._request.tool_call_format,
            finish_reason=finish_reason,
            logprobs=None,
        )


def _new_call_id(tool_call_format: ToolCallFormat, index: int) -> str:
    """A call's id: unique for OpenAI's clients; its number, "0" as in TGI, for TGI's."""
    return f"call_{secrets.token_hex(12)}" if tool_call_format == "openai" else str(index)
