"""An engine: steps, one after the other, over whatever rows there are."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from .calendar import Calendar
from .call import Call
from .costs import StepCost
from .prefix_cache import BLOCK_TOKENS, PrefixCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a replica; the names are those of the server's settings.

    Attributes:
        max_batch_size: rows of a step.
        max_batch_prefill_tokens: tokens that a step computes.
        max_batch_total_tokens: tokens that the cache holds for running sequences.
        max_concurrent_requests: calls that run or wait; more are refused.
        cached_tokens: tokens of beginnings that are kept; 0 switches the prefix cache off.
    """

    max_batch_size: int = 32
    max_batch_prefill_tokens: int = 2048
    max_batch_total_tokens: int = 65_536
    max_concurrent_requests: int = 128
    cached_tokens: int = 32_768


@dataclass(frozen=True, slots=True)
class StepEnd:
    """What a step gave: the calls with their first token and with their last, and tokens in all."""

    first: list[Call]
    last: list[Call]
    num_tokens: int


class Replica:
    """Continuous batching with prompts in chunks, as `engine/scheduling/scheduler.py` has it.

    Every decoding row has a token in each step. What is left of the step's budget goes to prompts
    in the order in which they came. A sequence starts if its row and all its tokens have room, so
    that none is ever preempted, which the real engine does now and then. Only calls that start or
    end in a step cost time to simulate, since the rows between have the same in common: a token.

    Args:
        calendar: where its steps end.
        cost: of a step.
        limits: see Limits.
        on_step: is told of each step when it ends.
    """

    def __init__(
        self,
        calendar: Calendar,
        cost: StepCost,
        limits: Limits,
        on_step: Callable[[StepEnd], None],
    ) -> None:
        self.cache = PrefixCache(limits.cached_tokens // BLOCK_TOKENS)
        self.calls: dict[Call, None] = {}
        self.is_up = True
        self.busy_s = 0.0
        self.hit_tokens = 0
        self.shared_tokens = 0
        self._calendar, self._cost, self._limits, self._on_step = calendar, cost, limits, on_step
        self._life = 0  # steps of an earlier life end without effect
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[Call] = deque()
        self._prompts: deque[Call] = deque()
        self._ending: defaultdict[int, list[Call]] = defaultdict(list)  # by number of the step
        self._num_decoding = 0
        self._context_tokens = 0
        self._held_tokens = 0
        self._step = 0
        self._is_stepping = False

    @property
    def is_full(self) -> bool:
        """Whether it refuses calls."""
        return len(self.calls) >= self._limits.max_concurrent_requests

    @property
    def num_rows(self) -> int:
        """Sequences that run."""
        return self._num_decoding + len(self._prompts)

    def submit(self, call: Call) -> None:
        """Takes a call."""
        self.calls[call] = None
        self._waiting.append(call)
        if not self._is_stepping:
            self._begin_step()

    def die(self) -> list[Call]:
        """Ends; returns the calls that it had."""
        lost = [*self.calls]
        self.calls.clear()
        self.cache.clear()
        self.is_up = False
        self._life += 1
        self._reset()
        return lost

    def _begin_step(self) -> None:
        self._admit()
        ready, prompt_tokens = self._take_prompts()
        rows = self._num_decoding + len(ready)
        self._is_stepping = rows + prompt_tokens > 0
        if not self._is_stepping:
            return
        seconds = self._cost.seconds(rows, prompt_tokens, self._context_tokens)
        life, ends = self._life, self._calendar.now + seconds
        self._calendar.at(ends, lambda: self._end_step(life, seconds, ready))

    def _admit(self) -> None:
        limits = self._limits
        while (
            self._waiting
            and self.num_rows < limits.max_batch_size
            and self._held_tokens + self._waiting[0].max_tokens <= limits.max_batch_total_tokens
        ):
            call = self._waiting.popleft()
            self._held_tokens += call.max_tokens
            call.pending = call.prompt_tokens - self._found(call)
            self._prompts.append(call)

    def _found(self, call: Call) -> int:
        """Tokens of its prompt that need not be computed; one always is."""
        found = self.cache.find(call.session, call.shared_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        self.shared_tokens += call.shared_tokens
        self.hit_tokens += found
        return min(found, call.prompt_tokens - 1)

    def _take_prompts(self) -> tuple[list[Call], int]:
        """Plans chunks; returns the calls whose prompt is complete with them, and the tokens."""
        budget = left = self._limits.max_batch_prefill_tokens - self._num_decoding
        ready = []
        while self._prompts and left > 0:
            call = self._prompts[0]
            chunk = min(call.pending, left)
            call.pending -= chunk
            left -= chunk
            if call.pending == 0:
                ready.append(self._prompts.popleft())
        return ready, budget - left

    def _end_step(self, life: int, seconds: float, ready: list[Call]) -> None:
        if life != self._life:
            return
        self._step += 1
        self.busy_s += seconds
        num_tokens = self._num_decoding + len(ready)
        self._context_tokens += self._num_decoding
        for call in ready:
            self._start_decoding(call)
        last = self._ending.pop(self._step, [])
        for call in last:
            self._leave(call)
        self._on_step(StepEnd(ready, last, num_tokens))
        self._begin_step()

    def _start_decoding(self, call: Call) -> None:
        call.started_step = self._step
        self._num_decoding += 1
        self._context_tokens += call.prompt_tokens
        self._ending[self._step + call.new_tokens - 1].append(call)
        self.cache.keep(call.session, call.shared_tokens // BLOCK_TOKENS)

    def _leave(self, call: Call) -> None:
        self._num_decoding -= 1
        self._context_tokens -= call.prompt_tokens + call.new_tokens - 1
        self._held_tokens -= call.max_tokens
        del self.calls[call]
