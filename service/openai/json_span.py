"""Finds the end of a JSON value in a text that grows, without parsing the value."""

from __future__ import annotations


class JsonSpan:
    """Counts the braces and brackets of one object or list.

    Attributes:
        is_complete: whether it has ended.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.is_complete = False

    def push(self, text: str) -> int:
        """How many characters of the next piece of the text belong to the value."""
        for index, char in enumerate(text):
            if self._closes(char):
                return index + 1
        return len(text)

    def _closes(self, char: str) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_complete = self._depth <= 0
        return self.is_complete
