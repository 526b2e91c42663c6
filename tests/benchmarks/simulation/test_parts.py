"""Balancers, caches, fits and quantiles by themselves."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from benchmarks.simulation.balancers import Hosts, LeastRequest, RingHash
from benchmarks.simulation.costs import StepCost
from benchmarks.simulation.fit import fit
from benchmarks.simulation.prefix_cache import PrefixCache
from benchmarks.simulation.results import quantiles
from benchmarks.simulation.workload import Workload


def test_a_key_stays_with_its_host_and_few_move_when_one_goes() -> None:
    hosts = Hosts(10)
    ring = RingHash(hosts)
    before = [ring.choose(key, 0) for key in range(1000)]
    assert before == [ring.choose(key, 0) for key in range(1000)]
    hosts.mark(3, is_healthy=False)
    after = [ring.choose(key, 0) for key in range(1000)]
    assert 3 not in after
    assert all(old == new for old, new in zip(before, after, strict=True) if old != 3)


def test_a_larger_ring_divides_keys_more_evenly() -> None:
    def most(ring_size: int) -> int:
        ring = RingHash(Hosts(100), ring_size=ring_size)
        return max(Counter(ring.choose(key, 0) for key in range(20_000)).values())

    assert most(100_000) < 1.5 * 200 < most(1024)


def test_a_host_over_its_bound_is_passed_over_for_the_same_one() -> None:
    hosts = Hosts(8)
    ring = RingHash(hosts, bound=1.25)
    first = ring.choose(7, 0)
    for _ in range(5):
        hosts.started(first)
    second = ring.choose(7, 0)
    assert second != first
    assert ring.choose(7, 0) == second


def test_least_request_never_takes_the_busier_of_two() -> None:
    hosts = Hosts(2)
    hosts.started(0)
    balancer = LeastRequest(hosts, random.Random(0))
    shares = Counter(balancer.choose(0, 0) for _ in range(4000))
    assert shares[1] / 4000 == pytest.approx(0.75, abs=0.03)  # the other only if drawn twice


def test_blocks_not_used_for_longest_go_first_and_of_these_the_last() -> None:
    cache = PrefixCache(4)
    cache.keep(1, 2)
    cache.keep(2, 2)
    cache.keep(1, 2)
    cache.keep(3, 1)
    assert [cache.find(session, 2) for session in (1, 2, 3)] == [2, 1, 1]
    assert len(cache) == 4


def test_costs_are_found_again_and_none_is_negative() -> None:
    generator = np.random.default_rng(0)
    counts = generator.uniform(1, 10, (50, 3))
    seconds = counts @ [2.0, 0.0, 0.5]
    found = fit(("a", "b", "c"), counts.tolist(), seconds.tolist())
    assert found.seconds == pytest.approx({"a": 2.0, "b": 0.0, "c": 0.5}, abs=1e-9)
    assert found.p90_error < 1e-9
    less = fit(("a", "b"), counts[:, :2].tolist(), (counts[:, 0] - 0.05 * counts[:, 1]).tolist())
    assert less.seconds["b"] == 0


def test_a_step_costs_the_sum_of_its_parts() -> None:
    cost = StepCost(base_s=1, per_row_s=0.1, per_prompt_token_s=0.01, per_context_token_s=0.001)
    assert cost.seconds(10, 100, 1000) == pytest.approx(4)
    assert cost.faster(2).seconds(10, 100, 1000) == pytest.approx(2)
    step_s = 1 + 0.1 * 8 + 0.01 * 8 / 4 * 10 + 0.001 * 8 * 12
    assert cost.calls_per_s(8, 10, 4) == pytest.approx(8 / 4 / step_s)


def test_quantiles_are_weighted() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 98.0, 1.0])
    assert quantiles(values, weights, (0.5, 0.985, 1.0)) == [1.0, 2.0, 3.0]
    assert quantiles(np.array([]), np.array([]), (0.5,)) == [0.0]


def test_calls_come_at_their_rate_and_sessions_by_zipf() -> None:
    load = Workload(rate=100, duration_s=200, num_sessions=50, skew=1.0)
    calls = [*load.calls(0)]
    assert len(calls) == pytest.approx(20_000, rel=0.03)
    sessions = Counter(call.session for call in calls)
    assert sessions[0] / sessions[9] == pytest.approx(10, rel=0.2)
    assert all(64 <= call.prompt_tokens <= 192 for call in calls)
