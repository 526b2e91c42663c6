"""Reads a text that grows by steps, each of which takes something from its beginning."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .pieces import Piece


class SteppingReader(ABC):
    """Holds a text back until a step can make pieces of its beginning."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """What the next piece of the text adds."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    @abstractmethod
    def finish(self, *, is_cut: bool) -> list[Piece]:
        """What was held back, once the text has ended, or was cut off."""

    @abstractmethod
    def _step(self, pieces: list[Piece]) -> bool:
        """Makes pieces of the beginning of what is held; whether there may be more."""
