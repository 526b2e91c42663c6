"""Reads calls whose arguments come one by one, each as plain text between marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from ..tool_calls import ToolCallDelta
from .argument_pairs import Parameter
from .marked_reader import num_held
from .pieces import Content, Piece
from .stepping_reader import SteppingReader

_MAY_BE_NAME = re.compile(r"[^\s<>{}\"]{0,256}\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMarks:
    """How such calls are told from text.

    Attributes:
        opening: begins a call.
        name_opening: stands before a function's name; empty where the opening does.
        name: matches from behind the opening to the end of the name; its group `name` is that.
        key_opening: stands before an argument's name.
        key: matches an argument's name, with what encloses it; its group `key` is that.
        value_end: ends a value.
        has_lines: whether values have a line break before and behind them that is none of them.
        end: ends the arguments of a call.
        closing: ends a call.
    """

    opening: str
    name_opening: str
    name: re.Pattern[str]
    key_opening: str
    key: re.Pattern[str]
    value_end: str
    has_lines: bool
    end: str
    closing: str


class _State(Enum):
    TEXT = auto()
    NAME = auto()
    PAIRS = auto()
    VALUE = auto()
    TAIL = auto()


class PairReader(SteppingReader):
    """Turns text with such calls into pieces; a string comes while it is written.

    Args:
        marks: of the form.
        parameters: of each function that can be called.
    """

    def __init__(self, marks: PairMarks, parameters: Mapping[str, Mapping[str, Parameter]]) -> None:
        super().__init__()
        self._marks = marks
        self._known = parameters
        self._state = _State.TEXT
        self._num_calls = 0
        self._num_pairs = 0  # of this call
        self._parameters: Mapping[str, Parameter] = {}  # of this call's function
        self._parameter = Parameter("", {}, {})
        self._has_quote = False  # a string is being written

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back. What is left of a call is no content."""
        held, self._held = self._held, ""
        if self._state is _State.NAME:
            return [] if is_cut else [Content(self._marks.opening + held)]
        if self._state is not _State.TEXT:
            return []
        if is_cut and self._marks.opening.startswith(held.strip()):
            return []
        return [Content(held)] if held.strip() or (held and not self._num_calls) else []

    def _step(self, pieces: list[Piece]) -> bool:
        match self._state:
            case _State.TEXT:
                return self._text(pieces)
            case _State.NAME:
                return self._name(pieces)
            case _State.PAIRS:
                return self._pair(pieces)
            case _State.VALUE:
                return self._value(pieces)
        return self._tail()

    def _go_on(self, state: _State, num_read: int) -> None:
        self._state, self._held = state, self._held[num_read:]

    def _text(self, pieces: list[Piece]) -> bool:
        opening = self._marks.opening
        at = self._held.find(opening)
        is_call = at >= 0
        free = at if is_call else len(self._held) - num_held(self._held, (opening,))
        before = self._held[:free].rstrip() if is_call else self._held[:free]
        if before:
            pieces.append(Content(before))
        self._go_on(_State.NAME if is_call else _State.TEXT, free + len(opening) * is_call)
        return is_call

    def _name(self, pieces: list[Piece]) -> bool:
        if (match := self._marks.name.match(self._held)) is not None:
            self._parameters = self._known.get(match["name"], {})
            self._num_pairs = 0
            pieces.append(ToolCallDelta(name=match["name"], index=self._num_calls))
            self._num_calls += 1
            self._go_on(_State.PAIRS, match.end())
            return True
        if self._may_be_name(self._held.lstrip()):
            return False
        pieces.append(Content(self._marks.opening))  # it begins no call
        self._go_on(_State.TEXT, 0)
        return bool(self._held)

    def _may_be_name(self, begun: str) -> bool:
        first = self._marks.name_opening
        if len(begun) <= len(first):
            return first.startswith(begun)
        name = begun.removeprefix(first)
        return begun.startswith(first) and _MAY_BE_NAME.fullmatch(name) is not None

    def _pair(self, pieces: list[Piece]) -> bool:
        marks = self._marks
        found = [(self._held.find(mark), mark) for mark in (marks.key_opening, marks.end)]
        at, mark = min(((at, mark) for at, mark in found if at >= 0), default=(-1, ""))
        if at < 0:  # nothing but line breaks stands between arguments
            num_kept = num_held(self._held, (marks.key_opening, marks.end))
            self._held = self._held[len(self._held) - num_kept :]
            return False
        self._held = self._held[at:]
        if mark == marks.end:
            text = "}" if self._num_pairs else "{}"
            pieces.append(ToolCallDelta(index=self._num_calls - 1, arguments=text, is_end=True))
            self._go_on(_State.TAIL, len(mark))
            return True
        if (match := marks.key.match(self._held)) is None:
            return False
        self._begin(match["key"], pieces)
        self._go_on(_State.VALUE, match.end())
        return True

    def _begin(self, key: str, pieces: list[Piece]) -> None:
        self._parameter = self._parameters.get(key, Parameter(key, {}, {}))
        self._has_quote = False
        name = json.dumps(key, ensure_ascii=False)
        self._add(f"{', ' if self._num_pairs else '{'}{name}: ", pieces)
        self._num_pairs += 1

    def _value(self, pieces: list[Piece]) -> bool:
        end = self._marks.value_end
        at = self._held.find(end)
        is_text = self._parameter.is_text
        if at < 0:
            if is_text and (free := len(self._held) - num_held(self._held, (end,))) > 0:
                self._quote(self._held[:free], pieces)
                self._held = self._held[free:]
            return False
        text = self._held[:at]
        if self._marks.has_lines:
            text = text.removesuffix("\n")
        if is_text:
            self._quote(text, pieces)
            self._add('"', pieces)
        else:
            self._add(self._parameter.json_of(text), pieces)
        self._go_on(_State.PAIRS, at + len(end))
        return True

    def _quote(self, text: str, pieces: list[Piece]) -> None:
        """Adds a part of a string."""
        first = "" if self._has_quote else '"'
        self._has_quote = True
        self._add(first + json.dumps(text, ensure_ascii=False)[1:-1], pieces)

    def _add(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(ToolCallDelta(index=self._num_calls - 1, arguments=text))

    def _tail(self) -> bool:
        closing = self._marks.closing
        visible = self._held.lstrip()
        if not closing or visible.startswith(closing):
            self._go_on(_State.TEXT, len(self._held) - len(visible) + len(closing))
            return True
        if closing.startswith(visible):
            return False
        self._go_on(_State.TEXT, 0)
        return True
