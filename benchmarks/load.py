"""Requests for concurrent streams: prompts and answers of mixed lengths, the same for all peers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.random_model import VOCAB_SIZE, prompt

_SALTS = itertools.count()


@dataclass(frozen=True, slots=True)
class Item:
    """The token ids of a prompt, the number of tokens to generate, and an adapter's digest."""

    prompt: list[int]
    new_tokens: int
    adapter: str = ""


class Load:
    """Makes items with the same lengths every time, but with new prompts.

    Lengths are spread evenly over a range, in an order that a fixed seed decides; a single item has
    the middle of the range. Prompts are numbered across all loads, so that no two are the same and
    no prefix cache helps.

    Args:
        prompt_tokens: the shortest and the longest prompt.
        new_tokens: the shortest and the longest answer.
        vocab_size: upper bound of the token ids.
    """

    def __init__(
        self,
        prompt_tokens: tuple[int, int],
        new_tokens: tuple[int, int],
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self._vocab_size = vocab_size

    def items(self, count: int) -> list[Item]:
        """`count` items with new prompts."""
        shuffle = random.Random(count).shuffle
        prompts, answers = _spread(*self.prompt_tokens, count), _spread(*self.new_tokens, count)
        shuffle(prompts)
        shuffle(answers)
        return [
            Item(prompt(length, next(_SALTS), self._vocab_size), new_tokens)
            for length, new_tokens in zip(prompts, answers, strict=True)
        ]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompt_tokens[1] + self.new_tokens[1]


def uniform(prompt_tokens: int, new_tokens: int, vocab_size: int = VOCAB_SIZE) -> Load:
    """A load in which all prompts and all answers have the same length."""
    return Load((prompt_tokens, prompt_tokens), (new_tokens, new_tokens), vocab_size)


def generated(items: Sequence[Item]) -> int:
    """The total number of tokens to generate."""
    return sum(item.new_tokens for item in items)


def _spread(low: int, high: int, count: int) -> list[int]:
    """`count` evenly spaced numbers from low to high; the middle if there is only one."""
    if count == 1:
        return [(low + high) // 2]
    return [low + (high - low) * index // (count - 1) for index in range(count)]
