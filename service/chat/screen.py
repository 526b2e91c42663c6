"""What is written: an answer as it comes, notes beside it, and colours where they can be seen."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from .answer import Piece
from .calls import Call

_DIM, _BOLD, _RED, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
# A model's text must not command the terminal; line ends and tabs may stay.
_COMMANDS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_THINKING = "[thinking] "


class Screen:
    """The output of a conversation.

    Args:
        out: where answers go.
        notes: where everything else goes.
    """

    def __init__(self, out: TextIO | None = None, notes: TextIO | None = None) -> None:
        self._out, self._notes = out or sys.stdout, notes or sys.stderr
        self.is_terminal = self._out.isatty()
        self._thinks = False
        self._line_is_open = False

    def show(self, piece: Piece) -> None:
        """Writes a part of an answer; reasoning on a terminal alone."""
        if piece.reasoning and self.is_terminal:
            start = "" if self._thinks or _colours(self._out) else _THINKING
            self._thinks = True
            self._write(start + _painted(self._out, _DIM, piece.reasoning.translate(_COMMANDS)))
        if piece.text:
            self._write(("\n\n" if self._thinks else "") + self._clean(piece.text))
            self._thinks = False

    def end_answer(self, *, has_text: bool = True) -> None:
        """Ends the line of an answer; one that is to have no text may have none."""
        self._thinks = False
        if has_text or self._line_is_open:
            self._write("\n")
        self._line_is_open = False

    def write_calls(self, calls: Sequence[Call]) -> None:
        """Writes calls for a program, a line of JSON for each."""
        for call in calls:
            self._write(self._clean(call.line) + "\n")

    def note(self, text: str) -> None:
        """Tells something that is no answer."""
        self._notes.write(_painted(self._notes, _DIM, text.translate(_COMMANDS)) + "\n")
        self._notes.flush()

    def error(self, text: str) -> None:
        """Tells what went wrong."""
        self._notes.write(_painted(self._notes, _RED, text.translate(_COMMANDS)) + "\n")
        self._notes.flush()

    def prompt(self, text: str = "> ") -> str:
        """What stands before what is typed; marked so that readline knows what has no width."""
        if not self.is_terminal:
            return ""
        return f"\x01{_BOLD}\x02{text}\x01{_PLAIN}\x02" if _colours(self._out) else text

    def _clean(self, text: str) -> str:
        return text.translate(_COMMANDS) if self.is_terminal else text

    def _write(self, text: str) -> None:
        self._line_is_open = True
        self._out.write(text)
        self._out.flush()


def _colours(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _painted(stream: TextIO, colour: str, text: str) -> str:
    return f"{colour}{text}{_PLAIN}" if _colours(stream) else text
