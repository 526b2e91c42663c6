"""Seeded random choices for the corpus, with a split between training and held-out material.

Lists of phrasings and pools of slot values are split by position: every sixth entry is shown only
when the accuracy is measured, so that a good score cannot come from memory alone.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import facts

T = TypeVar("T")
Message = dict[str, Any]
Tool = dict[str, Any]

HOLD_OUT_EVERY = 6


@dataclass(frozen=True)
class Document:
    """One training or evaluation document: a conversation, or plain text when it has no messages.

    A conversation ends with the assistant turn to learn. Plain text is `prompt` + `completion`.
    `accepted` lists the answers that count as right; it is empty where there is no one answer.
    """

    skill: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    prompt: str = ""
    completion: str = ""
    accepted: tuple[str, ...] = ()


def is_held_out(index: int) -> bool:
    """Tell whether the entry at this position of a list is kept for evaluation."""
    return index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1


class Source:
    """A random source that knows whether it writes training or held-out documents."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.held_out = held_out

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Choose any entry; used where the entry itself is a fact to learn."""
        return options[int(self.rng.random() * len(options))]

    def split(self, options: Sequence[T]) -> T:
        """Choose an entry of this side of the split; short lists are not split."""
        size = len(options)
        if size < HOLD_OUT_EVERY:
            return self.pick(options)
        if self.held_out:
            return options[
                HOLD_OUT_EVERY * int(self.rng.random() * (size // HOLD_OUT_EVERY))
                + HOLD_OUT_EVERY
                - 1
            ]
        while True:
            index = int(self.rng.random() * size)
            if not is_held_out(index):
                return options[index]

    def number(self, low: int, high: int) -> int:
        """Return a whole number between low and high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def ask(self, templates: Sequence[str], **slots: object) -> str:
        """Fill one template of the list, written the way people type."""
        return self.casual(self.split(templates)).format(**slots)

    def casual(self, template: str) -> str:
        """Vary case, punctuation and spelling of a template without touching its slots."""
        if self.chance(0.15) and template[0] != "{":
            template = template[0].lower() + template[1:]
        if self.chance(0.15):
            template = template.rstrip("?.!")
        elif self.chance(0.03):
            template += self.pick(("!", "?", "..", " please"))
        if self.chance(0.06):
            template = self.misspell(template)
        return template

    def misspell(self, template: str) -> str:
        """Swap, drop or double one letter of one longer word outside the slots."""
        words = list(re.finditer(r"(?<![{\w])[a-z]{4,}(?![}\w])", template))
        if not words:
            return template
        word = self.pick(words)
        at = self.number(word.start() + 1, word.end() - 2)
        first, second = template[at], template[at + 1]
        wrong = self.pick((second + first, first, first + first + second))
        return template[:at] + wrong + template[at + 2 :]

    def invented(self, syllables: int) -> str:
        """Make up a capitalized word, so that copying cannot rely on known names."""
        parts = [
            self.pick(facts.SYNTHETIC_ONSETS) + self.pick(facts.SYNTHETIC_VOWELS)
            for _ in range(syllables)
        ]
        return ("".join(parts) + self.pick(facts.SYNTHETIC_CODAS)).capitalize()

    def name(self) -> str:
        """Return a first name, sometimes with a family name or made up."""
        if self.chance(0.55):
            name = self.split(facts.FIRST_NAMES)
        else:
            name = self.invented(self.number(1, 3))
        if self.chance(0.08):
            name += " " + self.invented(self.number(2, 3))
        return name

    def city(self) -> str:
        """Return a city, known or made up."""
        if self.chance(0.6):
            return self.split(facts.CITIES)
        name = self.invented(self.number(1, 3))
        if self.chance(0.1):
            name = self.pick(("New ", "San ", "Port ", "Saint ", "Los ")) + name
        return name
