"""Tells calls from an answer of a given form: a grammar has made the text one or the other."""

from __future__ import annotations

from .pieces import Content, Piece, Reader
from .think import PlainReader


class ChoiceReader:
    """Reads calls where the text begins like one, and else nothing but text.

    Marks of calls inside of an answer, as in a string of its JSON, mean nothing.

    Args:
        calls: reads calls.
        beginnings: of calls.
    """

    def __init__(self, calls: Reader, beginnings: tuple[str, ...]) -> None:
        self._calls = calls
        self._beginnings = beginnings
        self._chosen: Reader | None = None
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """What the next piece of the text adds."""
        if self._chosen is None:
            self._held += text
            self._chosen = self._choice(self._held.lstrip())
            if self._chosen is None:
                return []
            text, self._held = self._held, ""
        return self._chosen.push(text)

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back; the beginning of a call that was cut off is no content."""
        if self._chosen is not None:
            return self._chosen.finish(is_cut=is_cut)
        return [Content(self._held)] if self._held and not is_cut else []

    def _choice(self, visible: str) -> Reader | None:
        if visible.startswith(self._beginnings):
            return self._calls
        is_open = any(beginning.startswith(visible) for beginning in self._beginnings)
        return None if is_open else PlainReader()
