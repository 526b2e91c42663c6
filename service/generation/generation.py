"""A generation as callers see it: its tokens, the events of these, and the whole at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .lazy import Lazy
from .parameters import GenerationRequest


class Token(NamedTuple):
    """One token as callers see it. `logprob` is None when it is not a finite number."""

    id: int
    text: str
    logprob: float | None
    special: bool


@dataclass(frozen=True, slots=True)
class PrefillToken:
    """One token of the prompt, and the likeliest tokens at its place if they were asked for."""

    id: int
    text: str
    logprob: float | None
    top_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """When a request passed its stages, in seconds of the monotonic clock.

    Attributes:
        received: when the call arrived.
        validated: when it was valid and was sent to the engine.
        started: when the engine reported its first step.
        finished: when its last token arrived.
        first_token: when its first token arrived.
    """

    received: float
    validated: float
    started: float
    finished: float
    first_token: float | None = None

    def per_output_token(self, num_tokens: int) -> float | None:
        """Mean seconds between two of so many tokens; None where there are no two."""
        if self.first_token is None or num_tokens < 2:
            return None
        return (self.finished - self.first_token) / (num_tokens - 1)

    @property
    def total(self) -> float:
        """Seconds from receipt to the end."""
        return self.finished - self.received

    @property
    def validation(self) -> float:
        """Seconds from receipt until the request was queued."""
        return self.validated - self.received

    @property
    def queue(self) -> float:
        """Seconds in the queue, until its first step."""
        return self.started - self.validated

    @property
    def inference(self) -> float:
        """Seconds from its first step to the end."""
        return self.finished - self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished text. `seed` is None for greedy generation.

    `num_cached_tokens` are those of the prompt that the KV cache had already. `matched_stop` is the
    stop sequence or the stop token that ended the text.
    """

    request: GenerationRequest
    text: str
    finish_reason: str
    tokens: Sequence[Token]
    top_tokens: Sequence[list[Token]]
    prefill: Sequence[PrefillToken]
    seed: int | None
    timings: Timings
    num_cached_tokens: int = 0
    matched_stop: str | int | None = None
    best_of_sequences: list[Generation] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, after truncation."""
        return len(self.request.prompt_token_ids)

    @property
    def generated_text(self) -> str:
        """The text, with the prompt in front if that was asked for."""
        if not self.request.detokenize:
            return ""
        return self.request.inputs + self.text if self.request.return_full_text else self.text

    def release(self) -> None:
        """Frees what its tokens took, once nothing reads them any more; see `Lazy.release`."""
        for listed in (self.tokens, self.top_tokens):
            if isinstance(listed, Lazy):
                listed.release()
        for other in self.best_of_sequences:
            other.release()

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of a token, which `best_of` ranks by."""
        return sum(token.logprob or 0.0 for token in self.tokens) / max(len(self.tokens), 1)


class TokenEvent(NamedTuple):
    """One token of a stream; the last one carries the whole generation.

    `number` counts a text's tokens from 1, and `choice` the texts of a prompt from 0.
    """

    token: Token
    top_tokens: Sequence[Token]
    generation: Generation | None = None
    number: int = 1
    choice: int = 0
