"""The parts agree with queueing theory, whose formulas are exact."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.simulation.calendar import Calendar
from benchmarks.simulation.costs import Costs, Handling, StepCost
from benchmarks.simulation.fleet import Setup, simulate
from benchmarks.simulation.replica import Limits
from benchmarks.simulation.station import Station
from benchmarks.simulation.workload import Workload

NOTHING = Handling(idle_share=0, per_call_s=0, per_token_s=0)


def mean_time(num_cores: int, use: float, count: int = 200_000) -> float:
    """Mean seconds in a station whose jobs take 1 s on average, both times exponential."""
    generator, station = random.Random(0), Station(num_cores)
    gaps = (generator.expovariate(use * num_cores) for _ in range(count))
    arrivals = itertools.accumulate(gaps)
    return sum(station.finish(now, generator.expovariate(1)) - now for now in arrivals) / count


@pytest.mark.parametrize("use", [0.3, 0.7, 0.9])
def test_one_processor_is_an_m_m_1_queue(use: float) -> None:
    assert mean_time(1, use) == pytest.approx(1 / (1 - use), rel=0.06)


def test_two_processors_are_an_m_m_2_queue() -> None:
    use = 0.8
    assert mean_time(2, use) == pytest.approx(1 / (1 - use**2), rel=0.04)  # by Erlang's C formula


def test_a_replica_of_one_row_is_an_m_d_1_queue() -> None:
    """Answers of one token of as many steps: the mean wait is Pollaczek's and Khinchine's."""
    step = StepCost(base_s=1, per_row_s=0, per_prompt_token_s=0, per_context_token_s=0)
    use = 0.7
    found = simulate(
        Setup(
            replicas=1,
            costs=Costs(step=step, service=NOTHING, envoy=NOTHING),
            limits=Limits(max_batch_size=1, max_concurrent_requests=10_000),
        ),
        Workload(rate=use, duration_s=60_000, own_tokens=1, new_tokens=1),
    )
    assert found.replica_use == pytest.approx(use, rel=0.02)
    assert found.first_token_mean == pytest.approx(1 + use / 2 / (1 - use), rel=0.05)


def test_an_idle_share_makes_jobs_longer() -> None:
    assert Station(1, idle_share=0.5).finish(0, 1) == 2
    assert Station(2, idle_share=0.5).finish(0, 3) == 4


def test_what_is_entered_for_the_same_second_happens_in_that_order() -> None:
    calendar, seen = Calendar(), list[str]()
    for second, name in ((2, "c"), (1, "a"), (1, "b"), (3, "d")):
        calendar.at(second, lambda name=name: seen.append(name))
    calendar.run()
    assert seen == ["a", "b", "c", "d"]
    assert calendar.now == 3
