"""Which calls come when."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from .call import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Independent users: a Poisson process of calls of sessions.

    Attributes:
        rate: calls per second on average.
        duration_s: seconds in which calls come.
        shared_tokens: what the prompts of a session begin with.
        own_tokens: the rest of a prompt, on average; uniform from half to one and a half of it.
        new_tokens: of an answer, on average; as `own_tokens`.
        num_sessions: how many there are.
        num_earlier: calls that have come before and left their beginnings in the caches; those
            calls take no time.
        skew: the exponent s of Zipf's law: the n-th session has calls in proportion to n ** -s; 0
            makes them all alike.
    """

    rate: float
    duration_s: float
    shared_tokens: int = 0
    own_tokens: int = 128
    new_tokens: int = 64
    num_sessions: int = 1000
    num_earlier: int = 0
    skew: float = 0.0

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls in the order of their arrival; the same seed gives the same."""
        return itertools.takewhile(lambda call: call.arrived < self.duration_s, self.endless(seed))

    def endless(self, seed: int) -> Iterator[Call]:
        """As `calls`, without an end."""
        generator = random.Random(seed)
        sessions = range(self.num_sessions)
        weights = [*itertools.accumulate((n + 1) ** -self.skew for n in sessions)]
        arrived = 0.0
        while True:
            arrived += generator.expovariate(self.rate)
            (session,) = generator.choices(sessions, cum_weights=weights)
            yield Call(
                arrived=arrived,
                session=session,
                shared_tokens=self.shared_tokens,
                prompt_tokens=self.shared_tokens + _about(self.own_tokens, generator),
                new_tokens=_about(self.new_tokens, generator),
            )


def _about(mean: int, generator: random.Random) -> int:
    return generator.randint(mean - mean // 2, mean + mean // 2)
