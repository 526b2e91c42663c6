"""Seeded random choices for the corpus, with a split between training and held-out material.

Two things are held out for evaluation, so that memory alone gives no good score: every twelfth
question, chosen by a hash of its words, and every sixth name, city and topic of the word lists.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import facts

T = TypeVar("T")
Message = dict[str, Any]
Tool = dict[str, Any]

HOLD_OUT_EVERY = 6  # one of this many entries of a word list
HOLD_OUT_QUESTIONS = 12  # one of this many questions


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


def is_kept_back(question: str) -> bool:
    """Tell whether a question is held out; case and punctuation do not matter."""
    words = " ".join(re.findall(r"\w+", question.lower()))
    return zlib.crc32(words.encode()) % HOLD_OUT_QUESTIONS == 0


def is_held_out(index: int) -> bool:
    """Tell whether the entry at this index of a word list is held out."""
    return index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1


class Source:
    """A source of random choices for either training or held-out documents."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.held_out = held_out
        self.copying = 0.0  # share of copying exercises among the documents
        self.pieces: Sequence[str] = ()  # parts of words, from which words are made up
        self.kept_back: list[bool] = []  # per question asked so far in this document

    def begin(self) -> None:
        """Start a new document."""
        self.kept_back = []

    def is_wanted(self) -> bool:
        """Tell whether the document made since `begin` belongs to this side of the split.

        A document without a question belongs to the side whose words it uses.
        """
        if self.held_out:
            return not self.kept_back or self.kept_back[-1]
        return not any(self.kept_back)

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Choose any entry, held out or not: for facts, which must all be learned."""
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
        """Fill one question of a list, spelt as people type, and record whether it is held out."""
        question = self.say(templates, **slots)
        self.kept_back.append(bool(slots) and is_kept_back(question))
        return question

    def say(self, templates: Sequence[str], **slots: object) -> str:
        """Fill one template that is never held out; the words in its slots may be."""
        return self.casual(self.pick(templates)).format(**slots)

    def address(self, phrases: Sequence[str]) -> str:
        """Return one phrase without slots, often with words around it.

        All bare phrases occur in training, since nothing else teaches their meaning. Held out are
        combinations with words around them.
        """
        phrase = self.casual(self.pick(phrases))
        if self.chance(0.5):
            self.kept_back.append(False)
            return phrase
        text = phrase.rstrip("?.!")
        mark = phrase[len(text) :]
        opener, address = self.pick(facts.OPENERS), self.pick(facts.ADDRESSES)
        phrase = f"{opener}{text}{address}{mark}"
        self.kept_back.append(is_kept_back(phrase))
        return phrase

    def casual(self, template: str) -> str:
        """Vary case, punctuation and spelling of a template without touching its slots."""
        if self.chance(0.15) and template[0] != "{":
            template = template[0].lower() + template[1:]
        if self.chance(0.15):
            template = template.rstrip("?.!")
        elif self.chance(0.03):
            template += self.pick(("!", "?", "..", " please"))
        if self.chance(0.02):
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
        """Make up a capitalized word, which the model cannot know and has to copy."""
        parts = [
            self.pick(facts.SYNTHETIC_ONSETS) + self.pick(facts.SYNTHETIC_VOWELS)
            for _ in range(syllables)
        ]
        return ("".join(parts) + self.pick(facts.SYNTHETIC_CODAS)).capitalize()

    def blend(self) -> str:
        """Make up a word from the beginning of one name and the end of another.

        Such words consist of the same tokens as unknown names, so they teach copying those.
        """
        first, second = (self.split(self.pick((facts.FIRST_NAMES, facts.CITIES))) for _ in range(2))
        cut = self.number(1, max(len(first) - 1, 1))
        return first[:cut] + second[self.number(1, len(second) - 1) :].lower()

    def made_up(self) -> str:
        """Make up a name of any kind."""
        if self.pieces and self.chance(0.35):
            return "".join(self.pick(self.pieces) for _ in range(self.number(2, 4))).capitalize()
        return self.blend() if self.chance(0.5) else self.invented(self.number(1, 2))

    def name(self) -> str:
        """Return a first name, sometimes with a family name or made up."""
        name = self.split(facts.FIRST_NAMES) if self.chance(0.5) else self.made_up()
        if self.chance(0.05):
            name += " " + self.made_up()
        return name

    def city(self) -> str:
        """Return a city, known or made up."""
        if self.chance(0.5):
            return self.split(facts.CITIES)
        name = self.made_up()
        if self.chance(0.1):
            name = self.pick(("New ", "San ", "Port ", "Saint ", "Los ")) + name
        return name
