"""A Dockerfile, read as far as ours goes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: what it is built on, and its instructions, as pairs of name and text."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, name: str) -> list[str]:
        """What follows an instruction's name, for each that has it."""
        return [text for instruction, text in self.instructions if instruction == name]

    def copies(self) -> list[tuple[list[str], str]]:
        """Paths of the checkout, and where they go."""
        words = [text.split() for text in self.texts("COPY") if not text.startswith("--from")]
        return [(sources, place) for *sources, place in words]

    def words(self, name: str) -> list[str]:
        """The last instruction of a name, which is a JSON list."""
        words: list[str] = json.loads(self.texts(name)[-1])
        return words

    def variables(self) -> dict[str, str]:
        """What ENV sets, as it is written."""
        pairs = (word.partition("=") for text in self.texts("ENV") for word in text.split())
        return {name: value for name, _, value in pairs}


def stages(path: Path) -> dict[str, Stage]:
    """The stages by name, in their order."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, text = line.strip().partition(" ")
        if name == "FROM":
            base, _, stage = text.split()
            found[stage] = Stage(base)
        elif name and found:
            list(found.values())[-1].instructions.append((name, text.strip()))
    return found
