"""A call on its way through the fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """How a call ended."""

    COMPLETED = "completed"
    REFUSED = "refused"  # 429: the replica has as many as it may
    UNAVAILABLE = "unavailable"  # 503: no replica took it, retries included
    BROKEN = "broken"  # its replica died after the first token


@dataclass(slots=True, eq=False)
class Call:
    """A call, in tokens and seconds of the calendar.

    Attributes:
        arrived: when it came to Envoy.
        session: what it shares its beginning with, and what is hashed.
        shared_tokens: of its prompt, those that all calls of the session begin with.
        prompt_tokens: all of its prompt.
        new_tokens: of its answer.
        envoy: which Envoy has it.
        tried: the replicas that did not answer it.
        pending: tokens of the prompt that are still to be computed.
        started_step: number of the replica's step that gave its first token.
        first_token: when that left Envoy.
        outcome: how it ended.
    """

    arrived: float
    session: int
    shared_tokens: int
    prompt_tokens: int
    new_tokens: int
    envoy: int = 0
    tried: list[int] = field(default_factory=list)
    pending: int = 0
    started_step: int = -1
    first_token: float | None = None
    outcome: Outcome | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens that it may come to hold in the cache."""
        return self.prompt_tokens + self.new_tokens
