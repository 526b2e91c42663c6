"""A server that answers as it is told, and a terminal's end of a session."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable
from typing import Any

from service.chat.answer import ChatError, Piece
from service.chat.conversation import Conversation
from service.chat.screen import Screen
from service.chat.session import Session


class FakeServer:
    """Answers with these pieces, one list per question; an error is raised.

    Attributes:
        requests: what was asked for, so far.
    """

    def __init__(self, *answers: list[Piece | ChatError]) -> None:
        self._answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    def model(self) -> str:
        """See Server."""
        return "fake"

    def answer(self, body: dict[str, Any]) -> Generator[Piece]:
        """See Server."""
        self.requests.append(body)
        for item in self._answers.pop(0):
            if isinstance(item, ChatError):
                raise item
            yield item

    def close(self) -> None:
        """See Server."""


class Typed:
    """Somebody who types these lines; an exception is raised in place of one."""

    def __init__(self, lines: Iterable[str | type[BaseException]]) -> None:
        self._lines = iter([*lines, "/quit"])

    def __call__(self, prompt: str) -> str:
        """The next line."""
        line = next(self._lines)
        if isinstance(line, str):
            return line
        raise line


def talk(
    server: FakeServer, conversation: Conversation, *lines: str | type[BaseException]
) -> tuple[str, str]:
    """Types all lines; returns what was answered, and what was said beside."""
    out, notes = io.StringIO(), io.StringIO()
    Session(server, conversation, Screen(out, notes), Typed(lines)).run()
    return out.getvalue(), notes.getvalue()
