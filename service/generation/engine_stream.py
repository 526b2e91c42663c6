"""A request in progress, whichever engine computes it: its outputs so far, and how it goes on."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.protocol.request import Request, SequenceOutput

from ..call_record import CallRecord, current_record
from ..errors import ServiceError, cancelled, overloaded
from ..timeline import SequenceTimeline
from .tally import Pace


class StreamOwner(Protocol):
    """What has an engine compute requests."""

    def release(self, stream: Stream) -> None:
        """Ends the work on a request, if it has not ended."""

    def ended(self) -> None:
        """One of its requests has ended."""


@dataclass(slots=True, eq=False)
class Stream:
    """A request in progress.

    Attributes:
        request: as it was made.
        pace: how fast it gets its tokens.
        call: that it is a part of; None outside of calls.
        request_id: by which its engine knows it; each further engine gets another one, so that
            nothing is taken from one that it was taken away from.
        owner: of the engine that computes it.
        timeline: what happened to it when.
        waiting: outputs that the caller has not read yet, or the error that ends them.
        reader: of a caller that waits for an output.
        token_ids: generated so far, by all engines.
        num_prompt_logprobs: log-probabilities of the prompt that were received.
        num_repeated_logprobs: of these, those that a new engine will send again.
        is_taken: whether that engine has said that it has it.
        lost_at: when it was last taken for a possible cause, by the monotonic clock.
        num_restarts: how often an engine died of which it may be the cause.
        num_stalls: how often it was taken away from one that did not get on, likewise.
        on_end: is called when the last output is received.
        ended: whether it was; the caller may not have read it yet.
    """

    request: Request
    pace: Pace
    call: CallRecord | None = None
    request_id: str = ""
    owner: StreamOwner | None = None
    timeline: SequenceTimeline = field(default_factory=SequenceTimeline)
    waiting: deque[SequenceOutput | ServiceError] = field(default_factory=deque)
    reader: asyncio.Future[None] | None = None
    token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_repeated_logprobs: int = 0
    is_taken: bool = False
    lost_at: float = -math.inf
    num_restarts: int = 0
    num_stalls: int = 0
    on_end: Callable[[], object] = lambda: None
    ended: bool = False

    def push(self, output: SequenceOutput) -> None:
        """Queues a step's output, without log-probabilities that an earlier engine sent already."""
        if output.prompt_logprobs:
            output = self._without_repeated(output)
        if output.token is not None:
            self.token_ids.append(output.token.token_id)
        if output.is_last and not self.ended:
            self.ended = True
            if self.owner is not None:
                self.owner.ended()
            self.on_end()
        self.put(output)

    def _without_repeated(self, output: SequenceOutput) -> SequenceOutput:
        fresh = output.prompt_logprobs[self.num_repeated_logprobs :]
        self.num_repeated_logprobs -= len(output.prompt_logprobs) - len(fresh)
        self.num_prompt_logprobs += len(fresh)
        tops = output.prompt_tops[len(output.prompt_logprobs) - len(fresh) :]
        return output._replace(prompt_logprobs=fresh, prompt_tops=tops)

    def put(self, item: SequenceOutput | ServiceError) -> None:
        """Adds an item and wakes the caller, once for all that come before it runs."""
        self.waiting.append(item)
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    def abort(self) -> None:
        """Fails it, in place of what its reader has not had yet; not after its last output."""
        if self.waiting or not self.ended:
            self.waiting.clear()
            self.put(cancelled())

    async def next(self) -> SequenceOutput:
        """The next output; an `asyncio.Queue` would take three times as long for each.

        Raises:
            ServiceError: the stream has failed.
        """
        while not self.waiting:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        output = self.waiting.popleft()
        if isinstance(output, ServiceError):
            raise output
        return output

    def lose_engine(self, alive_at: float) -> bool:
        """Its engine is gone, or does not get on.

        Several engines may end at once, by a cause of their own. One that had not said that it has
        the request, and was there before the last loss that counted, says nothing of it.

        Args:
            alive_at: when that engine was alive for certain, by the monotonic clock.

        Returns:
            Whether the request may be the cause.
        """
        may_be_cause = self.is_taken or alive_at > self.lost_at
        self.is_taken = False
        if may_be_cause:
            self.lost_at = time.monotonic()
        self.timeline.lose_engine()
        return may_be_cause

    @property
    def computed_token_ids(self) -> tuple[int, ...]:
        """Prompt and generated tokens so far."""
        return (*self.request.prompt_token_ids, *self.token_ids)

    def to_engine(self) -> Request:
        """The request for an engine, which continues after the tokens received so far."""
        request = self.request
        if self.request_id != request.request_id:
            request = replace(request, request_id=self.request_id)
        generated = (*request.resumed_token_ids, *self.token_ids)
        if self.token_ids:
            return replace(request, resumed_token_ids=generated, prompt_logprobs=False)
        self.num_repeated_logprobs = self.num_prompt_logprobs
        return request

    async def outputs(
        self, begin: Callable[[Stream], None], max_waiting_s: float | None
    ) -> AsyncGenerator[SequenceOutput]:
        """Yields the output of each step until it ends. Closing the iterator aborts it.

        Args:
            begin: gives it to an engine.
            max_waiting_s: how long it may wait for its first step; None sets no bound.

        Raises:
            ServiceError: `begin` has failed, the call was aborted, or it has waited too long.
        """
        if self.call is not None and self.call.is_aborted:
            raise cancelled()
        begin(self)
        if self.call is not None:
            self.call.sequences.append(self.timeline)
        try:
            yield await self._first(max_waiting_s)
            while self.waiting or not self.ended:
                yield await self.next()
        finally:
            assert self.owner is not None
            self.owner.release(self)
            self.timeline.end()

    async def _first(self, max_waiting_s: float | None) -> SequenceOutput:
        try:
            async with asyncio.timeout(max_waiting_s):
                return await self.next()
        except TimeoutError:
            raise overloaded(f"the request has waited for {max_waiting_s:g} s") from None


def open_stream(request: Request, on_end: Callable[[], object]) -> Stream:
    """A stream of the current call, for a request that no engine has yet."""
    call = current_record()
    begun = time.monotonic() if call is None else call.began
    pace = Pace(begun, len(request.prompt_token_ids), bool(request.grammar), call)
    return Stream(request, pace, call, request.request_id, on_end=on_end)
