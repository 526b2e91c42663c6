"""A whole measurement against a server in the same process."""

from __future__ import annotations

import pytest

from service import cli
from service.bench.command import bench
from service.bench.queue_time import mean_queue_s
from service.bench.report import Report
from service.bench.transport import Failure
from service.client.target import TargetError
from tests.service.bench.fakes import OVERLOADED, FakeClock, FakeTransport, options


class TestBench:
    async def test_warm_up_is_not_counted_and_finds_a_seed_that_does_not_end_early(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, early_seeds=(10, 11))
        asked = options(
            "--requests=5", "--warm-up=3", "--concurrency=2", "--output-tokens=4", "--seed=10"
        )
        report = await bench(transport, asked, clock)
        assert [task.seed for task in transport.tasks] == [10, 11, 12, *[12] * 5]
        assert (report.summary.succeeded, report.summary.ended_early) == (5, 0)
        assert (report.prompt_tokens, report.queue_s) == (128.0, 0.25)
        assert len({task.prompt.split()[0] for task in transport.tasks}) == 8

    async def test_failures_are_counted(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [None, None, OVERLOADED, None, OVERLOADED])
        report = await bench(transport, options("--requests=4", "--warm-up=2", "--rate=9"), clock)
        assert (report.summary.succeeded, report.summary.failed) == (2, 2)

    async def test_an_overloaded_warm_up_does_not_stop_it(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [OVERLOADED] * 2)
        report = await bench(transport, options("--requests=4", "--warm-up=2"), clock)
        assert report.summary.succeeded == 4

    async def test_invalid_requests_stop_it(self) -> None:
        clock = FakeClock()
        transport = FakeTransport(clock, [Failure("validation", "422", "too\nlong")] * 2)
        with pytest.raises(TargetError, match=r"^cannot measure http\S+ validation 422: too long$"):
            await bench(transport, options("--requests=4", "--warm-up=2"), clock)


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.bench.command._run", interrupted)
    assert cli.main(["bench"]) == 130


def test_queue_time_is_the_mean_between_two_readings() -> None:
    before = "# HELP x\ntgi_request_queue_duration_sum 1.0\ntgi_request_queue_duration_count 4.0\n"
    after = "tgi_request_queue_duration_sum 4.0\ntgi_request_queue_duration_count 10.0\n"
    assert mean_queue_s(before, after) == 0.5
    assert mean_queue_s("", after) == 0.4
    assert mean_queue_s(after, after) is None
    assert mean_queue_s("", "") is None
