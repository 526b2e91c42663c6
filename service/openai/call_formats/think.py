"""Reasoning in tags: `<think>…</think>` before the answer."""

from __future__ import annotations

from .marked_reader import num_held
from .pieces import Content, Piece, Reader, Reasoned

START, END = "<think>", "</think>"
TAGS = frozenset({START, END})


class PlainReader:
    """Reads an answer that is nothing but text."""

    def push(self, text: str) -> list[Piece]:
        """The text."""
        return [Content(text)] if text else []

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """Nothing is held back."""
        del is_cut
        return []


class ThinkReader:
    """Splits reasoning off.

    Args:
        answer: reads what follows the reasoning.
        is_open: whether the prompt ends inside of the reasoning.
    """

    def __init__(self, answer: Reader, *, is_open: bool) -> None:
        self._answer = answer
        self._held = ""
        self._is_open = is_open
        self._has_begun = False  # something visible was there
        self._is_over = False
        self._has_reasoned = False

    def push(self, text: str) -> list[Piece]:
        """What the next piece of the text adds."""
        if self._is_over:
            return self._pushed(text)
        self._held += text
        if not self._has_begun and not self._begin():
            return []
        return self._pushed(self._taken()) if self._is_over else self._reasoned()

    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back: reasoning that was cut off, or text."""
        held, self._held = self._held, ""
        if self._is_open and not self._is_over and self._has_begun:
            return [Reasoned(held)] if held.strip() else []
        return [*self._answer.push(held), *self._answer.finish(is_cut=is_cut)]

    def _begin(self) -> bool:
        """Looks for the first tag, which is the start, unless the prompt had it."""
        visible = self._held.lstrip()
        if not visible or (START.startswith(visible) and visible != START):
            return False
        self._has_begun = True
        if visible.startswith(START):
            self._is_open = True
            self._held = visible.removeprefix(START)
        elif self._is_open:
            self._held = visible
        self._is_over = not self._is_open
        return True

    def _reasoned(self) -> list[Piece]:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        text, mark, rest = self._held.partition(END)
        if mark:
            self._is_over, self._held = True, ""
            last: list[Piece] = [Reasoned(text.rstrip())] if text.strip() else []
            return [*last, *self._pushed(rest)]
        free = len(text) - num_held(text, (END,))
        self._held = text[free:]
        self._has_reasoned = self._has_reasoned or free > 0
        return [Reasoned(text[:free])] if free else []

    def _pushed(self, text: str) -> list[Piece]:
        """Hands text on; the empty lines between reasoning and answer are dropped."""
        if self._is_open:
            text = text.lstrip("\n")
            self._is_open = not text  # until the first text that is something
        return self._answer.push(text) if text else []

    def _taken(self) -> str:
        held, self._held = self._held, ""
        return held
