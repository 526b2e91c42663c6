"""Colours, reasoning and control characters, on terminals and elsewhere."""

from __future__ import annotations

import io

import pytest

from service.chat.answer import Piece
from service.chat.screen import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO) -> str:
    screen = Screen(out, io.StringIO())
    for piece in (Piece(reasoning="hm"), Piece(text="a\x1b[31mb\tc")):
        screen.show(piece)
    screen.end_answer()
    return out.getvalue()


def test_a_pipe_gets_the_text_as_it_is_and_no_reasoning() -> None:
    assert shown(io.StringIO()) == "a\x1b[31mb\tc\n"


def test_reasoning_is_dim_and_no_text_commands_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert shown(Terminal()) == "\x1b[2mhm\x1b[0m\n\na[31mb\tc\n"


def test_no_color_marks_reasoning_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Terminal()) == "[thinking] hm\n\na[31mb\tc\n"
