"""A clock that tests advance, a server in the same process, and values that tests share."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncGenerator, Iterable

from service.bench.options import BenchOptions, add_arguments, from_arguments
from service.bench.sample import Sample
from service.bench.transport import Failure, RequestFailed, Task

OVERLOADED = Failure("overloaded", "429", "Model is overloaded")
TASK = Task("hello", 2, 7)


def options(*flags: str) -> BenchOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return from_arguments(vars(parser.parse_args(flags)))


def sample(*arrivals: float, due: float = 0.0, failure: Failure | None = None) -> Sample:
    ended = arrivals[-1] if arrivals else due
    return Sample(due=due, sent=due, arrivals=arrivals, ended=ended, failure=failure)


class FakeClock:
    """A clock that advances only when a test or the fake server sets it."""

    def __init__(self, oversleeps: float = 0.0) -> None:
        self.time = 100.0
        self.oversleeps = oversleeps

    def now(self) -> float:
        return self.time

    async def sleep_until(self, moment: float) -> None:
        for _ in range(20):  # what other tasks have to do at this time
            await asyncio.sleep(0)
        self.time = max(self.time, moment) + self.oversleeps


class FakeTransport:
    """A server with a token for each word and a second per token; some seeds end early."""

    def __init__(
        self,
        clock: FakeClock,
        failures: Iterable[Failure | None] = (),
        early_seeds: tuple[int, ...] = (),
    ) -> None:
        self.clock = clock
        self.failures = iter(failures)
        self.early_seeds = early_seeds
        self.tasks: list[Task] = []
        self.running = self.most_running = 0

    async def token_stops(self, text: str) -> list[int]:
        return [0, *(match.end() for match in re.finditer(r"\S+", text))]

    async def metrics(self) -> str:
        count = len(self.tasks)
        return (
            f"tgi_request_queue_duration_count {count}\n"
            f"tgi_request_queue_duration_sum {count * 0.25}\n"
        )

    async def stream(self, task: Task) -> AsyncGenerator[None]:
        self.tasks.append(task)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            failure = next(self.failures, None)
            if failure is not None:
                raise RequestFailed(failure)
            for _ in range(1 if task.seed in self.early_seeds else task.max_new_tokens):
                await asyncio.sleep(0)
                self.clock.time += 1.0
                yield
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass
