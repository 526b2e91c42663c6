"""The form of gpt-oss: messages in channels, for reasoning, for calls and for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..json_span import JsonSpan
from ..tool_calls import ToolCallDelta
from ..tools import Tool
from .call_format import Marker, Wanted, arguments_rule, up_to
from .marked_reader import num_held
from .pieces import Content, Piece, Reader, Reasoned
from .stepping_reader import SteppingReader

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN, _END, _CALL, _RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)
_RECIPIENT = re.compile(r"to=(\S+?)(?=<|\s|$)")
# The prompt has begun the head of the first message, in which a recipient may stand.
_BEGUN_HEAD = re.compile(r"\s*to=[^\s<]+\s*(?:<\|channel\|>|<\|message\|>)")
_MAY_BE_HEAD = re.compile(r"\s*(?:t|to|to=[^\s<]*\s*(?:<[|a-z]*)?)?")
_FUNCTIONS = "functions."


class Harmony:
    """The form of gpt-oss."""

    name = "harmony"
    markers = frozenset({_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN})

    def fits(self, template: str) -> bool:
        """Whether the template has channels."""
        return _CHANNEL in template and _MESSAGE in template

    def rule(self, wanted: Wanted, marker: Marker, template: str) -> Any:
        """Reasoning, then one call, after which the model stops, or an answer."""
        del template
        channel, message = marker(_CHANNEL), marker(_MESSAGE)
        behind = [["commentary to=functions.", {"choice": self._calls(wanted, marker, " ")}]]
        if wanted.or_text:
            behind.append(["final", message, {"text": "any"}])
        before = [
            " to=functions.",
            {"choice": self._calls(wanted, marker, [channel, "commentary "])},
        ]
        return [self._before(marker), {"choice": [[channel, {"choice": behind}], before]}]

    def lead(self, marker: Marker) -> Any:
        """What comes before an answer: perhaps reasoning, then the head of the answer's message."""
        return [self._before(marker), marker(_CHANNEL), "final", marker(_MESSAGE)]

    def _before(self, marker: Marker) -> Any:
        """Messages before the last: reasoning, and what the model says about a call to come."""
        head = [marker(_CHANNEL), {"choice": ["analysis", "commentary"]}, marker(_MESSAGE)]
        return {"repeat": [*head, *up_to(marker(_END)), marker(_START), "assistant"]}

    def _calls(self, wanted: Wanted, marker: Marker, behind_name: Any) -> list[Any]:
        """Calls from the name on; the recipient stands behind the channel or before it."""
        head = [behind_name, marker(_CONSTRAIN), "json", marker(_MESSAGE)]
        return [[tool.name, *head, arguments_rule(tool)] for tool in wanted.tools]

    def beginnings(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        """Nothing: an answer has a channel of its own."""
        del tools
        return ()

    def reader(self, tools: Sequence[Tool]) -> Reader:
        """All channels. What calls none of these functions is none of the answer."""
        return HarmonyReader(frozenset(tool.name for tool in tools))


class HarmonyReader(SteppingReader):
    """Turns messages into pieces: the channel and the recipient in its head say what each is.

    Args:
        names: functions that can be called.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self._kind: type[Content] | type[Reasoned] | None = Content  # None: a call's arguments
        self._is_begun = False  # something visible was there
        self._in_head = False
        self._num_calls = 0
        self._span = JsonSpan()

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back; a head that has no message is none of an answer."""
        held, self._held = self._held, ""
        is_head = self._in_head or (not self._is_begun and is_cut and "=" in held)
        return [] if is_head else self._body(held)

    def _step(self, pieces: list[Piece]) -> bool:
        if not self._is_begun and not self._begin():
            return False
        return self._read_head(pieces) if self._in_head else self._read_body(pieces)

    def _begin(self) -> bool:
        """Looks for a recipient, with which an answer may begin."""
        if _MAY_BE_HEAD.fullmatch(self._held):
            return False
        self._is_begun = True
        self._in_head = _BEGUN_HEAD.match(self._held) is not None
        return True

    def _read_head(self, pieces: list[Piece]) -> bool:
        head, mark, rest = self._held.partition(_MESSAGE)
        if not mark:
            return False
        self._held, self._in_head = rest, False
        recipient = _RECIPIENT.search(head)
        name = "" if recipient is None else recipient[1].removeprefix(_FUNCTIONS)
        if name in self._names:
            self._kind, self._span = None, JsonSpan()
            pieces.append(ToolCallDelta(name=name, index=self._num_calls))
            self._num_calls += 1
        else:
            is_reasoning = "analysis" in head or recipient is not None
            self._kind = Reasoned if is_reasoning else Content
        return True

    def _read_body(self, pieces: list[Piece]) -> bool:
        found = [(self._held.find(mark), mark) for mark in _ENDS]
        at, mark = min(((at, mark) for at, mark in found if at >= 0), default=(-1, ""))
        if at < 0:
            free = len(self._held) - num_held(self._held, _ENDS)
            pieces += self._body(self._held[:free])
            self._held = self._held[free:]
            return False
        pieces += self._body(self._held[:at])
        self._held = self._held[at + len(mark) :]
        self._in_head = mark in (_START, _CHANNEL)
        self._kind = Content
        return True

    def _body(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._kind is not None:
            return [self._kind(text)]
        if self._span.is_complete:
            return []
        end = self._span.push(text)
        index, is_end = self._num_calls - 1, self._span.is_complete
        return [ToolCallDelta(index=index, arguments=text[:end], is_end=is_end)]
