"""Reads calls that stand between markers: what differs from form to form are expressions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from ..json_span import JsonSpan
from ..tool_calls import ToolCallDelta
from .pieces import Content, Piece
from .stepping_reader import SteppingReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How calls are told from text.

    Attributes:
        openings: texts that begin calls.
        head: matches from behind the opening up to the arguments' brace; its group `name` is the
            function's name, as JSON text if it begins with a quotation mark.
        next: matches what stands between the arguments of one call and the head of the next.
        end: matches what stands behind the last call.
        bare_end: the same where the last call had no object around it; None: that is the same.
        is_bare: whether calls need no opening at the very beginning of an answer.
        closing: ends a block of calls, if it has such a mark: with it, there was no call.
        may_head: whether a text can still become the head of a call of one of these functions.
            None: until its object has ended.
        keeps_opening: whether an opening that no call follows is part of the text.
    """

    openings: tuple[str, ...]
    head: re.Pattern[str]
    next: re.Pattern[str]
    end: re.Pattern[str]
    bare_end: re.Pattern[str] | None = None
    closing: str = ""
    is_bare: bool = False
    may_head: Callable[[str, frozenset[str] | None], bool] | None = None
    keeps_opening: bool = True


class _State(Enum):
    START = auto()  # nothing visible yet
    TEXT = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()


class MarkedReader(SteppingReader):
    """Turns text with marked calls into pieces.

    Args:
        marks: of the form.
        names: functions that can be called; others are text. None for any.
    """

    def __init__(self, marks: Marks, names: frozenset[str] | None = None) -> None:
        super().__init__()
        self._marks = marks
        self._names = names
        self._state = _State.START
        self._opened = ""  # the opening before what is held
        self._span = JsonSpan()  # of the arguments, before them of the head's object
        self._num_scanned = 0  # characters of what is held, from the object's brace on
        self._num_calls = 0
        self._end = marks.end  # of the last call

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back. The tail of a call is no content, and neither is one that was cut."""
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            closing = self._marks.closing
            is_begun = is_cut and not (closing and closing in held)
            return [] if is_begun else _content(self._reopened() + held)
        if self._state not in (_State.START, _State.TEXT):
            return []
        if is_cut and any(mark.startswith(held.strip()) for mark in self._marks.openings):
            return []  # the beginning of a mark, or white space
        return _content(held) if held.strip() or not self._num_calls else []

    def _step(self, pieces: list[Piece]) -> bool:
        match self._state:
            case _State.START:
                return self._start()
            case _State.TEXT:
                return self._text(pieces)
            case _State.HEAD:
                return self._head(pieces)
            case _State.ARGUMENTS:
                return self._arguments(pieces)
        return self._tail()

    def _start(self) -> bool:
        if not self._held.strip():
            return False
        is_call = self._marks.is_bare and self._held.lstrip().startswith("{")
        self._go_on(_State.HEAD if is_call else _State.TEXT)
        return True

    def _go_on(self, state: _State, num_read: int = 0) -> None:
        """Another state begins behind the characters that are read."""
        self._state, self._held = state, self._held[num_read:]
        self._span, self._num_scanned = JsonSpan(), 0

    def _text(self, pieces: list[Piece]) -> bool:
        found = [(self._held.find(mark), mark) for mark in self._marks.openings]
        at, mark = min(((at, mark) for at, mark in found if at >= 0), default=(-1, ""))
        if at >= 0:
            if before := self._held[:at].rstrip():
                pieces += _content(before)
            self._opened = mark
            self._go_on(_State.HEAD, at + len(mark))
            return True
        free = len(self._held) - num_held(self._held, self._marks.openings)
        pieces += _content(self._held[:free])
        self._held = self._held[free:]
        return False

    def _head(self, pieces: list[Piece]) -> bool:
        match = self._marks.head.match(self._held)
        if match is not None and self._is_known(name := _name(match["name"])):
            is_bare = "{" not in match[0]
            self._end = (is_bare and self._marks.bare_end) or self._marks.end
            pieces.append(ToolCallDelta(name=name, index=self._num_calls))
            self._num_calls += 1
            self._go_on(_State.ARGUMENTS, match.end())
            return True
        may_head = self._marks.may_head
        if may_head is not None and not may_head(self._held, self._names):
            return self._give_up(pieces)
        end = self._object_end()
        if end is None:
            return False
        if match is None and (whole := self._whole_call(self._held[:end])):
            pieces += whole
            self._go_on(_State.TAIL, end - 1)  # as after the arguments, which end one brace before
            return True
        return self._give_up(pieces)

    def _give_up(self, pieces: list[Piece]) -> bool:
        """What is held is no call: it is text, with the opening before it."""
        pieces += _content(self._reopened())
        pieces += _content(self._held[:1])  # so that the search goes on behind it
        self._opened = ""
        self._go_on(_State.TEXT, 1)
        return bool(self._held)

    def _object_end(self) -> int | None:
        """Where the first object in what is held ends; None if it does not.

        Each character is looked at once: an object may be long, and comes in many pieces.
        """
        if self._num_scanned == 0:
            self._num_scanned = self._held.find("{")
            if self._num_scanned < 0:
                self._num_scanned = 0
                return None
        self._num_scanned += self._span.push(self._held[self._num_scanned :])
        return self._num_scanned if self._span.is_complete else None

    def _reopened(self) -> str:
        return self._opened if self._marks.keeps_opening else ""

    def _whole_call(self, text: str) -> list[Piece]:
        """The call in an object whose keys are in another order; empty if it is none."""
        try:
            call = json.loads(text[text.find("{") :])
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, dict) or not self._is_known(name):
            return []
        index, self._num_calls = self._num_calls, self._num_calls + 1
        written = json.dumps(arguments, ensure_ascii=False)
        return [ToolCallDelta(name=name, index=index, arguments=written, is_end=True)]

    def _is_known(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _arguments(self, pieces: list[Piece]) -> bool:
        if not self._held:
            return False
        end = self._span.push(self._held)
        is_end = self._span.is_complete
        index = self._num_calls - 1
        pieces.append(ToolCallDelta(index=index, arguments=self._held[:end], is_end=is_end))
        self._held = self._held[end:]
        if is_end:
            self._go_on(_State.TAIL)
        return is_end

    def _tail(self) -> bool:
        if match := self._marks.next.match(self._held):
            self._opened = match[0].lstrip("}, \n")
            self._go_on(_State.HEAD, match.end())
            return True
        if match := self._end.match(self._held):
            self._go_on(_State.TEXT, match.end())
            return True
        return False


def num_held(text: str, marks: tuple[str, ...]) -> int:
    """How many last characters may be the beginning of a mark, with the white space before it."""
    longest = max(map(len, marks), default=0)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    begun = (size for size in sizes if any(mark.startswith(text[-size:]) for mark in marks))
    size = next(begun, 0)
    before = text[: len(text) - size]
    return size + len(before) - len(before.rstrip())


def _content(text: str) -> list[Piece]:
    return [Content(text)] if text else []


def _name(text: str) -> str:
    text = text.strip()
    parsed = _parsed(text)
    return parsed if isinstance(parsed, str) else text


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
