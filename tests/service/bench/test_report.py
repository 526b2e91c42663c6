"""What many samples are summarised to, and how that is printed."""

from __future__ import annotations

import json
import statistics

import pytest

from service.bench.report import Report
from service.bench.summary import Percentiles, percentiles, summarise
from service.bench.transport import Failure
from tests.service.bench.fakes import OVERLOADED, options, sample


class TestSummary:
    @pytest.mark.parametrize("count", [2, 5, 100, 1001])
    def test_percentiles_are_those_of_the_statistics_module(self, count: int) -> None:
        values = [(index * 7919) % 1009 / 10 for index in range(count)]
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        found = percentiles(values)
        assert found is not None
        assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))

    def test_percentiles_of_few(self) -> None:
        assert percentiles([]) is None
        assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0)

    def test_only_successful_requests_count(self) -> None:
        result = summarise(
            [
                sample(1.0, 2.0, 4.0),
                sample(3.0, 5.0, due=1.0),
                sample(9.0, due=1.0, failure=Failure("generation", "424", "x")),
                sample(due=2.0, failure=OVERLOADED),
                sample(due=2.0, failure=OVERLOADED),
            ],
            output_tokens=3,
        )
        assert (result.succeeded, result.failed, result.ended_early) == (2, 3, 1)
        assert (result.duration_s, result.generated_tokens) == (9.0, 5)
        assert (result.requests_per_s, result.output_tokens_per_s) == (2 / 9, 5 / 9)
        assert result.first_token == percentiles([1.0, 2.0])
        assert result.inter_token == percentiles([1.0, 2.0, 2.0])
        assert result.end_to_end == percentiles([4.0, 4.0])
        assert [(item.error_type, item.code, item.count) for item in result.failures] == [
            ("overloaded", "429", 2),
            ("generation", "424", 1),
        ]

    def test_nothing_but_failures(self) -> None:
        result = summarise([sample(failure=OVERLOADED)], 3)
        assert (result.succeeded, result.failed, result.requests_per_s) == (0, 1, 0.0)
        assert result.first_token is result.end_to_end is None


class TestReport:
    def report(self, *flags: str, failure: Failure | None = None) -> Report:
        samples = [sample(0.1, 0.2, failure=failure), sample(0.1, 0.3)]
        return Report(
            options=options("--requests=2", "--output-tokens=2", *flags),
            prompt_tokens=128.0,
            summary=summarise(samples, 2),
            queue_s=0.0125,
        )

    def test_table(self) -> None:
        assert self.report(failure=OVERLOADED).table() == (
            "http://127.0.0.1:8080: 2 requests, 8 at a time, 128 tokens in, 2 out\n"
            "\n"
            "ms                       p50         p90         p99\n"
            "first token            100.0       100.0       100.0\n"
            "between tokens         200.0       200.0       200.0\n"
            "whole answer           300.0       300.0       300.0\n"
            "\n"
            "6.7 output tokens/s, 3.33 requests/s, 12.5 ms in the queue\n"
            "1 succeeded, 1 failed in 0.3 s\n"
            "  1 x overloaded 429: Model is overloaded\n"
        )

    def test_table_of_an_open_loop_says_how_late_requests_were_sent(self) -> None:
        assert "sent late" in self.report("--rate=2").table()

    def test_json_is_one_line(self) -> None:
        text = self.report("--rate=2", "--seed=5", failure=OVERLOADED).json()
        assert "\n" not in text
        assert json.loads(text) == {
            "target": "http://127.0.0.1:8080",
            "transport": "rest",
            "loop": "open",
            "rate": 2.0,
            "concurrency": None,
            "requests": 2,
            "input_tokens": 128.0,
            "output_tokens": 2,
            "shared_prefix": 0,
            "seed": 5,
            "succeeded": 1,
            "failed": 1,
            "failures": [
                {
                    "error_type": "overloaded",
                    "code": "429",
                    "count": 1,
                    "message": "Model is overloaded",
                }
            ],
            "duration_s": 0.3,
            "requests_per_s": 3.333,
            "output_tokens_per_s": 6.67,
            "generated_tokens": 2,
            "ended_early": 0,
            "first_token_ms": {"p50": 100.0, "p90": 100.0, "p99": 100.0},
            "inter_token_ms": {"p50": 200.0, "p90": 200.0, "p99": 200.0},
            "end_to_end_ms": {"p50": 300.0, "p90": 300.0, "p99": 300.0},
            "sent_late_ms": {"p50": 0.0, "p90": 0.0, "p99": 0.0},
            "mean_queue_ms": 12.5,
        }
