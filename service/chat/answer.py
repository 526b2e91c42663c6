"""What a server sends while it answers, the same over every protocol."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from .calls import CallPart, call_parts


class ChatError(ConnectionError):
    """The server did not answer, or refused to; `str()` is one line that says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: what is said.
        reasoning: what is thought before.
        finish_reason: why the answer ends, in its last part.
        calls: what it says of calls.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    calls: tuple[CallPart, ...] = ()


# The ids of calls, and lists of them, whatever the server's own setting.
HEADERS = (("x-tool-call-format", "openai"),)


class Server(Protocol):
    """A way to ask the server. Everything but `close` raises ChatError."""

    def model(self) -> str:
        """The model's name."""

    def answer(self, body: dict[str, Any]) -> Generator[Piece]:
        """Streams the answer to a request of `/v1/chat/completions`; closing it cancels that."""

    def close(self) -> None:
        """Ends the connections."""


def piece(chunk: dict[str, Any]) -> Piece:
    """Reads a chunk of `/v1/chat/completions`, as JSON."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        return Piece(
            delta.get("content") or "",
            delta.get("reasoning_content") or "",
            choice.get("finish_reason") or "",
            call_parts(delta),
        )
    return Piece()


def refusal(status: str, message: str, retry_after: str | None) -> ChatError:
    """The error for an answer with a status that is none of success."""
    hint = f"; try again in {retry_after} s" if retry_after else ""
    return ChatError(f"{' '.join(message.split())} ({status}){hint}")
