"""Turns the tokens of an answer into a response, event by event."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import ServiceError
from ...generation.generation import Generation, TokenEvent
from ..chat_answer import ChatDelta, ChatStream
from ..head import Head
from ..usage import Usage
from .event import Event
from .item import Item, ItemKind, ScoredTokens, Status, item_id
from .request import ResponsesRequest
from .response import Response

_TEXTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
_ARGUMENTS = "response.function_call_arguments"


class ResponseStream:
    """Turns the tokens of an answer into events.

    An item is opened by the first thing in it, and closed when the next one begins or the answer
    ends.

    Attributes:
        response: the answer so far, without the item that is open.
    """

    def __init__(self, request: ResponsesRequest, head: Head) -> None:
        self.response = Response(head=head, repeated=request.repeated)
        self._chat = ChatStream(request.chat, head)
        self._number = 0
        self._open: Item | None = None
        self._texts: list[str] = []  # of the item that is open: its text, or its arguments
        self._scored: list[ScoredTokens] = []
        self._unsaid: ScoredTokens = ()  # tokens that are the beginning of a character
        self._reasoning = _ReasoningTokens()

    def begin(self) -> list[Event]:
        """The events before the first token."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.response) for kind in kinds]

    def push(self, event: TokenEvent) -> list[Event]:
        """The events that a token brings, and after the last one the end."""
        deltas = self._chat.push(event)
        self._reasoning.count(deltas)
        events = [item for delta in deltas for item in self._added(delta)]
        if event.generation is not None:
            reason = deltas[-1].finish_reason
            events += self._end(event.generation, is_cut=reason == "length")
        return events

    def fail(self, error: ServiceError) -> list[Event]:
        """The events after which nothing comes, for REST callers."""
        self._keep("incomplete")
        self.response = replace(self.response, status="failed", failure=error)
        return [
            self._event("error", failure=error),
            self._event("response.failed", response=self.response),
        ]

    def _added(self, delta: ChatDelta) -> list[Event]:
        if delta.reasoning:
            return self._text("reasoning", delta.reasoning, ())
        if delta.call is not None:
            return self._call(delta)
        scored = tuple(item for item in delta.logprobs or () if not item[0].special)
        scored, self._unsaid = self._unsaid + scored, ()
        if delta.text:
            return self._text("message", delta.text, scored)
        self._unsaid = scored
        return []

    def _text(self, kind: ItemKind, text: str, scored: ScoredTokens) -> list[Event]:
        events = []
        if self._open is None or self._open.kind != kind:
            events = [*self._close("completed"), *self._begin_item(kind)]
            scored = _of_text(scored, text)
        self._texts.append(text)
        self._scored.append(scored)
        event = self._of_item(f"{_TEXTS[kind]}.delta", is_part=True, delta=text, logprobs=scored)
        return [*events, event]

    def _call(self, delta: ChatDelta) -> list[Event]:
        call, events = delta.call, list[Event]()
        if call is None:
            return events
        if call.name is not None:
            events += self._close("completed")
            events += self._begin_item("function_call", delta.call_id, call.name)
        if call.arguments:
            self._texts.append(call.arguments)
            events.append(self._of_item(f"{_ARGUMENTS}.delta", delta=call.arguments))
        if call.is_end:
            events += self._close("completed", is_whole=True)
        return events

    def _begin_item(self, kind: ItemKind, call_id: str = "", name: str = "") -> list[Event]:
        its_id = item_id(kind, self.response.head.id, len(self.response.items))
        self._open = Item(id=its_id, kind=kind, call_id=call_id, name=name)
        self._texts, self._scored = [], []
        events = [self._of_item("response.output_item.added")]
        if kind in _TEXTS:
            self._open = replace(self._open, text="")
            events.append(self._of_item("response.content_part.added", is_part=True))
        return events

    def _close(self, status: Status, *, is_whole: bool = False) -> list[Event]:
        """Ends the item that is open; a call that is not whole is never complete."""
        if self._open is None:
            return []
        kind = self._open.kind
        if kind == "function_call":
            status = "completed" if is_whole else "incomplete"
        self._open = self._finished(self._open, status)
        events = []
        if kind in _TEXTS:
            scored = self._open.logprobs
            events.append(self._of_item(f"{_TEXTS[kind]}.done", is_part=True, logprobs=scored))
            events.append(self._of_item("response.content_part.done", is_part=True))
        elif is_whole:
            events.append(self._of_item(f"{_ARGUMENTS}.done"))
        events.append(self._of_item("response.output_item.done"))
        self._keep(status)
        return events

    def _keep(self, status: Status) -> None:
        """Puts the item that is open among the others."""
        if self._open is not None:
            items = (*self.response.items, self._finished(self._open, status))
            self.response = replace(self.response, items=items)
            self._open = None

    def _finished(self, item: Item, status: Status) -> Item:
        text = "".join(self._texts)
        if item.kind == "function_call":
            return replace(item, status=status, arguments=text)
        scored = tuple(entry for entries in self._scored for entry in entries)
        return replace(item, status=status, text=text, logprobs=scored)

    def _end(self, generation: Generation, *, is_cut: bool) -> list[Event]:
        status: Status = "incomplete" if is_cut else "completed"
        events = self._close(status)
        if not is_cut and all(item.kind == "reasoning" for item in self.response.items):
            events += [*self._begin_item("message"), *self._close(status)]  # it says nothing
        self.response = replace(
            self.response,
            status=status,
            usage=Usage.of([generation]),
            num_reasoning_tokens=self._reasoning.total(),
        )
        return [*events, self._event(f"response.{status}", response=self.response)]

    def _of_item(self, kind: str, **fields: Any) -> Event:
        """An event about the item that is open."""
        index = len(self.response.items)
        return self._event(kind, output_index=index, item=self._open, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return Event(type=kind, number=number, **fields)


class _ReasoningTokens:
    """Counts the tokens of reasoning. A token without text belongs to what comes next."""

    def __init__(self) -> None:
        self._total = 0
        self._num_pending = 0
        self._is_reasoning = False

    def count(self, deltas: list[ChatDelta]) -> None:
        """Counts a token, which brought these parts."""
        self._num_pending += 1
        kinds = [bool(item.reasoning) for item in deltas if _says_something(item)]
        if kinds:
            self._total += self._num_pending if kinds[0] else 0
            self._num_pending, self._is_reasoning = 0, kinds[-1]

    def total(self) -> int:
        """How many there were."""
        return self._total + (self._num_pending if self._is_reasoning else 0)


def _of_text(scored: ScoredTokens, text: str) -> ScoredTokens:
    """The tokens of an item's first text, without those of marks before it.

    Tokens without text are the beginning of the character that follows them.
    """
    texts = [token.text for token, _ in scored]
    starts = (at for at in reversed(range(len(texts))) if "".join(texts[at:]).startswith(text))
    start = next(starts, 0)
    while start and not texts[start - 1]:
        start -= 1
    return scored[start:]


def _says_something(delta: ChatDelta) -> bool:
    return bool(delta.reasoning or delta.text or delta.call is not None)


def answer(request: ResponsesRequest, generation: Generation, head: Head) -> Response:
    """The response that a generation makes: what its stream would have ended with."""
    stream = ResponseStream(request, head)
    tops = generation.top_tokens or [[] for _ in generation.tokens]
    last = len(generation.tokens) - 1
    for index, (token, top_tokens) in enumerate(zip(generation.tokens, tops, strict=True)):
        stream.push(TokenEvent(token, top_tokens, generation if index == last else None))
    return stream.response
