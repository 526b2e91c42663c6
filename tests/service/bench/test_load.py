"""When requests are sent, in an open and in a closed loop, and which times are recorded."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import AsyncGenerator

import pytest

from service.bench.arrivals import poisson_arrivals
from service.bench.load import RealClock, measure, run_closed, run_open
from service.bench.sample import Sample
from service.bench.transport import Failure, Task
from tests.service.bench.fakes import OVERLOADED, TASK, FakeClock, FakeTransport, sample


class TestPoissonArrivals:
    def test_are_reproducible_and_begin_at_once(self) -> None:
        times = poisson_arrivals(5.0, 100, seed=3)
        assert times == poisson_arrivals(5.0, 100, seed=3) != poisson_arrivals(5.0, 100, seed=4)
        assert (len(times), times[0]) == (100, 0.0)
        assert times == sorted(times)

    def test_have_the_rate_and_the_spread_of_a_poisson_process(self) -> None:
        times = poisson_arrivals(5.0, 20_001, seed=0)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
        assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)

    def test_twice_the_rate_is_the_same_pattern_in_half_the_time(self) -> None:
        slow, fast = (poisson_arrivals(rate, 50, seed=1) for rate in (1.0, 2.0))
        assert slow == pytest.approx([2 * moment for moment in fast])


class TestMeasuredTimes:
    async def test_latencies_of_an_open_loop_count_from_when_a_request_was_due(self) -> None:
        clock = FakeClock(oversleeps=0.5)
        transport = FakeTransport(clock)

        async def send(index: int, due: float) -> Sample:
            return await measure(transport, TASK, due, limit_s=9, clock=clock)

        first, second = await run_open(send, [0.0, 60.0], clock)
        assert [first.due, second.due] == [100.0, 160.0]
        assert first.lateness == second.lateness == 0.5
        assert second.first_token == 1.5
        assert second.end_to_end == 2.5
        assert second.gaps == [1.0]

    async def test_an_open_loop_does_not_wait_for_answers(self) -> None:
        release = asyncio.Event()
        begun: list[int] = []

        async def send(index: int, due: float) -> Sample:
            begun.append(index)
            if len(begun) == 5:
                release.set()
            await release.wait()
            return sample(due=due)

        samples = await run_open(send, [0.0, 0.001, 0.002, 0.002, 0.003], RealClock())
        assert begun == [0, 1, 2, 3, 4]
        assert [round(item.due - samples[0].due, 6) for item in samples] == [
            0.0, 0.001, 0.002, 0.002, 0.003,
        ]  # fmt: skip

    async def test_a_closed_loop_keeps_a_constant_number_running(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock)

        async def send(index: int, due: float) -> Sample:
            return await measure(transport, TASK, due, limit_s=9, clock=clock)

        samples = await run_closed(send, 10, 3, clock)
        assert len(samples) == 10
        assert transport.most_running == 3
        assert all(item.lateness == 0 for item in samples)

    async def test_a_failure_is_a_sample(self) -> None:
        clock = FakeClock()
        seen = await measure(FakeTransport(clock, [OVERLOADED]), TASK, 0, limit_s=9, clock=clock)
        assert (seen.failure, seen.arrivals) == (OVERLOADED, ())

    async def test_a_request_that_hangs_fails_and_is_cancelled(self) -> None:
        left = False

        class Hanging(FakeTransport):
            async def stream(self, task: Task) -> AsyncGenerator[None]:
                nonlocal left
                try:
                    yield
                    await asyncio.Event().wait()
                finally:
                    left = True

        transport = Hanging(FakeClock())
        seen = await measure(transport, TASK, 0, limit_s=0.005, clock=FakeClock())
        assert seen.failure == Failure("timeout", "", "no end within 0.005 s")
        assert len(seen.arrivals) == 1
        assert left
