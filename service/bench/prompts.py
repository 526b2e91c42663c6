"""Prompts of a given number of tokens that begin differently, so that prefix caches do not help.

The text is words like `w17423`, which are also the words of benchmarks/random_model.py. Two prompts
differ within their first word, long before a block of a cache is full.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..client.target import TargetError

TokenStops = Callable[[str], Awaitable[list[int]]]

_NUM_WORDS = 32_000
_FILLER = "w"  # with the space before it one token of nearly every vocabulary
_TRIES = 4
_NUM_TRIAL_WORDS = 100


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and how many tokens the server makes of it."""

    text: str
    num_tokens: int


class PromptMaker:
    """Makes prompts.

    Args:
        token_stops: tokenises: the offset of each token's end, 0 for tokens that the model adds.
        num_tokens: tokens of a prompt.
        salt: other salts give other prompts, so that a second run finds nothing in a cache.
    """

    def __init__(self, token_stops: TokenStops, num_tokens: int, salt: int) -> None:
        self._token_stops = token_stops
        self._num_tokens = num_tokens
        self._random = random.Random(salt)  # noqa: S311 - nothing secret
        self._order = self._random.sample(range(_NUM_WORDS), _NUM_WORDS)
        self._shared: list[str] = []
        self._tokens_per_word = 1.0

    async def prepare(self, num_shared: int) -> None:
        """Measures tokens per word; makes the `num_shared` tokens that all prompts begin with."""
        words = self._words(0, _NUM_TRIAL_WORDS)
        stops = await self._token_stops(" ".join(words))
        self._tokens_per_word = max(1.0, len(stops) / len(words))
        if num_shared:
            words = self._words(0, self._enough(num_shared))
            self._shared = (await self._fitted(words, 1, num_shared)).text.split()

    async def make(self, index: int) -> Prompt:
        """Returns the prompt with this number.

        Raises:
            TargetError: so few tokens have no room for the words that differ.
        """
        words = [*self._shared, *self._words(index + 1, self._enough(self._num_tokens))]
        return await self._fitted(words, len(self._shared) + 1, self._num_tokens)

    def _enough(self, num_tokens: int) -> int:
        """About how many words have so many tokens; excess words are cut off later."""
        return 1 + int(num_tokens / self._tokens_per_word)

    def _words(self, index: int, count: int) -> list[str]:
        """Random words, of which the first two depend on the index and differ for every prompt."""
        rounds, position = divmod(index, _NUM_WORDS)
        first = self._order[position]
        second = self._order[(position + rounds + 1) % _NUM_WORDS]
        others = self._random.choices(range(_NUM_WORDS), k=max(count - 2, 0))
        return [f"w{number}" for number in (first, second, *others)]

    async def _fitted(self, words: list[str], least: int, num_tokens: int) -> Prompt:
        """As many of the words as fit, then fillers; the server counts the tokens."""
        stops = await self._token_stops(" ".join(words))
        num_kept, num_used = _fitting(words, stops, num_tokens)
        num_fillers = num_tokens - num_used
        for _ in range(_TRIES):
            if num_kept < least:
                raise TargetError(f"{num_tokens} tokens are too few for prompts that differ")
            text = " ".join([*words[:num_kept], *[_FILLER] * num_fillers])
            excess = len(await self._token_stops(text)) - num_tokens
            if excess == 0:
                break
            num_fillers -= excess
            if num_fillers < 0:
                num_kept, num_fillers = num_kept - 1, 0
        return Prompt(text, num_tokens + excess)


def _fitting(words: list[str], stops: list[int], num_tokens: int) -> tuple[int, int]:
    """How many of the words fit into so many tokens, and how many tokens they take."""
    ordered = sorted(stops)
    num_kept, num_used, end = 0, 0, -1
    for count, word in enumerate(words, start=1):
        end += 1 + len(word)  # words are ASCII, so that bytes and characters are the same
        needed = bisect_right(ordered, end)
        if needed > num_tokens:
            break
        num_kept, num_used = count, needed
    return num_kept, num_used
