"""How many tokens a request took, as OpenAI's endpoints report it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..generation.generation import Generation
from .head import Head


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all prompts, and generated tokens, end-of-text tokens included.

    `num_cached_tokens` are those of the prompts that the KV cache had already.
    """

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0

    @classmethod
    def of(cls, generations: Iterable[Generation]) -> Usage:
        """What some generations took together."""
        return cls.of_choices([item] for item in generations)

    @classmethod
    def together(cls, answers: Iterable[Usage]) -> Usage:
        """Of all answers to one prompt, which is counted once."""
        done = list(answers)
        first = done[0]
        return replace(
            first, num_completion_tokens=sum(item.num_completion_tokens for item in done)
        )

    @classmethod
    def of_choices(cls, prompts: Iterable[Sequence[Generation]]) -> Usage:
        """What some prompts took, each with one generation or several, which share its tokens."""
        done = [list(choices) for choices in prompts if choices]
        return cls(
            sum(choices[0].num_prompt_tokens for choices in done),
            sum(len(item.tokens) for choices in done for item in choices),
            sum(choices[0].num_cached_tokens for choices in done),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUsage:
    """The chunk that ends a stream if its caller asked."""

    head: Head
    usage: Usage
