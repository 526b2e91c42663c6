"""Sends requests and notes when their tokens come: in an open loop, or in a closed one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from .sample import Sample
from .transport import Failure, RequestFailed, Task, Transport

Send = Callable[[int, float], Coroutine[Any, Any, Sample]]
"""Sends the request with this number, which is due at this moment; never raises."""


class Clock(Protocol):
    """Seconds, from anywhere."""

    def now(self) -> float:
        """The time."""

    async def sleep_until(self, moment: float) -> None:
        """Returns at a moment, or later."""


class RealClock:
    """The monotonic clock."""

    def now(self) -> float:
        """See Clock."""
        return time.perf_counter()

    async def sleep_until(self, moment: float) -> None:
        """See Clock. It yields even if the moment has passed, so that nobody starves."""
        await asyncio.sleep(max(0.0, moment - self.now()))


async def run_open(send: Send, arrivals: Sequence[float], clock: Clock) -> list[Sample]:
    """Sends each request at its moment, whatever became of those before.

    Args:
        send: sends one.
        arrivals: when each is due, in seconds from now.
        clock: tells the time.
    """
    started = clock.now()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, offset in enumerate(arrivals):
            due = started + offset
            await clock.sleep_until(due)
            tasks.append(group.create_task(send(index, due)))
    return [task.result() for task in tasks]


async def run_closed(send: Send, count: int, concurrency: int, clock: Clock) -> list[Sample]:
    """Keeps so many requests running; the next is due when one before it has ended."""
    indices = iter(range(count))
    samples: list[Sample] = []

    async def work() -> None:
        for index in indices:  # shared by all workers
            samples.append(await send(index, clock.now()))  # noqa: PERF401 - so do the others

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(work())
    return samples


async def measure(
    transport: Transport, task: Task, due: float, *, limit_s: float, clock: Clock
) -> Sample:
    """Sends one request and notes its moments."""
    failure: Failure | None = None
    arrivals: list[float] = []
    sent = clock.now()
    try:
        async with asyncio.timeout(limit_s), aclosing(transport.stream(task)) as tokens:
            async for _ in tokens:
                arrivals.append(clock.now())  # noqa: PERF401 - kept if the stream breaks
    except RequestFailed as error:
        failure = error.failure
    except TimeoutError:
        failure = Failure("timeout", "", f"no end within {limit_s:g} s")
    return Sample(due=due, sent=sent, arrivals=tuple(arrivals), ended=clock.now(), failure=failure)
