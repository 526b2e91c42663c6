"""Sends requests and records when their tokens arrive, in an open or a closed loop."""

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
    """Seconds since any fixed moment."""

    def now(self) -> float:
        """The time."""

    async def sleep_until(self, moment: float) -> None:
        """Returns at that time or later."""


class RealClock:
    """The monotonic clock."""

    def now(self) -> float:
        """See Clock."""
        return time.perf_counter()

    async def sleep_until(self, moment: float) -> None:
        """See Clock. Lets other tasks run even if the time has passed."""
        await asyncio.sleep(max(0.0, moment - self.now()))


async def run_open(send: Send, arrivals: Sequence[float], clock: Clock) -> list[Sample]:
    """Sends each request when it is due, whether or not earlier ones have been answered.

    Args:
        send: sends a request.
        arrivals: when each request is due, in seconds from now.
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
    """Keeps `concurrency` requests running; the next one is due when one of them ends."""
    indices = iter(range(count))
    samples: list[Sample] = []

    async def work() -> None:
        for index in indices:  # shared by all workers
            samples.append(await send(index, clock.now()))  # noqa: PERF401 - others append too

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(work())
    return samples


async def measure(
    transport: Transport, task: Task, due: float, *, limit_s: float, clock: Clock
) -> Sample:
    """Sends one request and records its times, or why it failed."""
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
