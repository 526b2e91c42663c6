"""What a model's text turns out to be, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..tool_calls import ToolCall, ToolCallDelta


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoned:
    """Text of the reasoning before the answer."""

    text: str


Piece = Content | Reasoned | ToolCallDelta


class Reader(Protocol):
    """Turns a text that grows into pieces. What may be part of a marker is held back."""

    def push(self, text: str) -> list[Piece]:
        """What the next piece of the text adds."""

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back, once the text has ended.

        If it was cut off, the beginning of a call that has no name yet is no content.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A whole answer. A call that was cut off has the arguments up to there.

    `is_call` says that there are calls, all of which are complete.
    """

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    is_call: bool

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Parsed:
        """Puts pieces together."""
        content, reasoning, names, arguments, num_complete = "", "", [], [], 0
        for piece in pieces:
            match piece:
                case Content(text):
                    content += text
                case Reasoned(text):
                    reasoning += text
                case ToolCallDelta():
                    if piece.name is not None:
                        names.append(piece.name)
                        arguments.append("")
                    arguments[-1] += piece.arguments
                    num_complete += piece.is_end
        calls = zip(names, arguments, strict=True)
        return cls(
            content=content,
            reasoning=reasoning,
            calls=tuple(ToolCall(name=name, arguments=text) for name, text in calls),
            is_call=num_complete == len(names) > 0,
        )
