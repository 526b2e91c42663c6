"""What a step of the engine has brought to the requests of this service.

This is the work per token, so it counts, and looks nothing up: what many sequences have in common
is observed once for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from engine.protocol.request import SequenceOutput

from ..call_record import CallRecord


@dataclass(slots=True)
class Pace:
    """How fast a request gets its tokens.

    Attributes:
        begun: when its call arrived, in seconds of the monotonic clock.
        num_prompt_tokens: of its prompt.
        has_grammar: whether a grammar may force tokens of it.
        call: the call that it is for.
        has_begun: whether a step has begun it; another engine may begin it again.
        last: when it got the token before; 0 if it has none yet.
    """

    begun: float
    num_prompt_tokens: int
    has_grammar: bool = False
    call: CallRecord | None = None
    has_begun: bool = False
    last: float = 0.0


@dataclass(slots=True)
class Tally:
    """Counts of one step.

    Attributes:
        now: when the step's outputs arrived, in seconds of the monotonic clock.
        num_prompt_tokens: prompt tokens of the requests that the step has begun.
        num_cached_tokens: of these, tokens that the KV cache had already.
        first: those requests that got their first token.
        previous: when the others got the token before, and how many of them.
        drafted: tokens beyond the first of requests without a grammar: accepted draft tokens.
        num_forced: tokens beyond the first of requests with a grammar, which it has forced.
    """

    now: float
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    first: list[Pace] = field(default_factory=list)
    previous: defaultdict[float, int] = field(default_factory=lambda: defaultdict(int))
    drafted: dict[int, int] = field(default_factory=dict)
    num_forced: int = 0

    @property
    def num_sequences(self) -> int:
        """Requests that got tokens."""
        return len(self.first) + sum(self.previous.values())

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return self.num_sequences + self.num_forced + sum(self.drafted.values())

    def add(self, pace: Pace, output: SequenceOutput) -> None:
        """Counts an output; those of one request come one after the other."""
        if output.first_scheduled and not pace.has_begun:
            pace.has_begun = True
            self.num_prompt_tokens += pace.num_prompt_tokens
            self.num_cached_tokens += min(output.num_cached_tokens, pace.num_prompt_tokens)
        if output.token is None:
            return
        last, now = pace.last, self.now
        if last == now:
            self._add_further(pace)
            return
        pace.last = now
        if last:
            self.previous[last] += 1
        else:
            self.first.append(pace)

    def _add_further(self, pace: Pace) -> None:
        if pace.has_grammar:
            self.num_forced += 1
        else:
            self.drafted[id(pace)] = self.drafted.get(id(pace), 0) + 1
