"""How many tokens a request took, as OpenAI's endpoints report it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..generation.generator import Generation
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
        done = list(generations)
        return cls(
            sum(item.num_prompt_tokens for item in done),
            sum(len(item.tokens) for item in done),
            sum(item.num_cached_tokens for item in done),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUsage:
    """The chunk that ends a stream if its caller asked."""

    head: Head
    usage: Usage
