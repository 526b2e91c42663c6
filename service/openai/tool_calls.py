"""Parses a model's tool calls, from its whole text or piece by piece from its stream."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from .json_span import JsonSpan

# A grammar makes the text up to the name's end, so its form is known.
_TEXT = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_BEGINNING = re.compile(rf'\s*\{{\s*"function"\s*:\s*\{{\s*"_name"\s*:\s*({_TEXT})\s*([,}}])')


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A finished call. `arguments` stays JSON text: a number in it may be of any size."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """What is new in a call: its name, which comes first, or a piece of its arguments' JSON.

    `index` is the call's number within the answer; `is_end` says that its arguments have ended.
    """

    name: str | None = None
    arguments: str = ""
    index: int = 0
    is_end: bool = False


class CallReader:
    """Turns the text of an envelope into a name and the JSON of the arguments.

    `{"function": {"_name": "f", "x": 1}}` gives the name `f` and `{"x": 1}`.

    Attributes:
        is_named: whether the name was read.
        is_text: whether the text is no envelope; then it is not parsed.
    """

    def __init__(self) -> None:
        self._held = ""  # the beginning, until the name is known
        self._opening = "{"  # of the arguments, until something follows it
        self.is_named = False
        self._span = JsonSpan()  # of the arguments
        self.is_text = False

    @property
    def is_complete(self) -> bool:
        """Whether the arguments have ended."""
        return self._span.is_complete

    def push(self, text: str) -> list[ToolCallDelta]:
        """What the next piece of the text adds."""
        if self.is_text:
            return []
        if self.is_named:
            return self._arguments(text)
        self._held += text
        if self._held.strip() and not self._held.lstrip().startswith("{"):
            self.is_text = True
            return []
        beginning = _BEGINNING.match(self._held)
        if beginning is None:
            return []
        self.is_named = True
        name = ToolCallDelta(name=json.loads(beginning[1]))
        rest = self._held[beginning.end() :] if beginning[2] == "," else "}"
        return [name, *self._arguments(rest)]

    def take_text(self) -> str:
        """The text that was held back and is no call; afterwards it is empty."""
        text, self._held = self._held, ""
        return text

    def _arguments(self, text: str) -> list[ToolCallDelta]:
        if self._opening:
            text = text.lstrip()
        if self.is_complete or not text:  # complete: this is the end of the envelope
            return []
        text, self._opening = self._opening + text, ""
        end = self._span.push(text)
        return [ToolCallDelta(arguments=text[:end], is_end=self.is_complete)]
