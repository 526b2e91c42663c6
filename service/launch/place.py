"""Which of several service processes a process is, and where they find each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TOKENWIRE_SIBLINGS"  # which the supervisor sets: it is nobody's setting


@dataclass(frozen=True, slots=True)
class Place:
    """One of several service processes of one engine, on one machine.

    Attributes:
        number: of this process, from 1.
        count: of all of them.
        directory: private to the user; what they share is there, whoever of them lives.
    """

    number: int
    count: int
    directory: Path

    @property
    def others(self) -> tuple[int, ...]:
        """The numbers of the others."""
        return tuple(number for number in range(1, self.count + 1) if number != self.number)

    @property
    def environment(self) -> dict[str, str]:
        """Tells a child its place."""
        return {VARIABLE: f"{self.number}/{self.count}:{self.directory}"}


def own_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None if it is the only service process.

    Raises:
        ValueError: the variable was set by somebody else.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return None
    numbers, _, directory = text.partition(":")
    number, _, count = numbers.partition("/")
    if not (number.isdecimal() and count.isdecimal() and directory):
        raise ValueError(f"{VARIABLE} is set by `tokenwire serve` alone. Given: {text}")
    return Place(int(number), int(count), Path(directory))
