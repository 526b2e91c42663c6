"""Fleets lose no call, do no more than there is time for, and balance as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulation.balancers import LeastRequest, Policy, Random, ring_hash
from benchmarks.simulation.call import Outcome
from benchmarks.simulation.costs import measured
from benchmarks.simulation.fleet import Failures, Setup, simulate
from benchmarks.simulation.replica import Limits
from benchmarks.simulation.workload import Workload

COSTS = measured()
CAPACITY = COSTS.step.calls_per_s(32, 128, 64)  # of a replica, calls/s
POLICIES: dict[str, Policy] = {
    "random": Random,
    "least request": LeastRequest,
    "ring": ring_hash(),
    "bound": ring_hash(1.25),
}
LOADS = [0.3, 1.0, 2.0]


def workload(load: float, replicas: int, **changes: object) -> Workload:
    found = Workload(rate=load * replicas * CAPACITY, duration_s=20.0, num_sessions=100)
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("life_s", [None, 10.0])
def test_every_call_ends_in_one_way(policy: Policy, load: float, life_s: float | None) -> None:
    setup = Setup(
        replicas=4,
        costs=COSTS,
        policy=policy,
        failures=None if life_s is None else Failures(mean_life_s=life_s, repair_s=5, detect_s=1),
    )
    found = simulate(setup, workload(load, 4))
    assert sum(found.outcomes.values()) == found.arrived > 0
    assert bool(found.deaths) == bool(life_s)
    assert bool(found.outcomes.get(Outcome.BROKEN)) == bool(life_s)


@pytest.mark.parametrize("load", LOADS)
def test_no_replica_computes_more_than_it_can(load: float) -> None:
    found = simulate(Setup(replicas=3, costs=COSTS), workload(load, 3, duration_s=60.0))
    most = 3 * COSTS.step.calls_per_s(32, 128, 64) * 64  # tokens/s of batches that are always full
    assert found.tokens_per_s * 60 / (60 + found.first_token_p99) < 1.1 * most
    assert (found.outcomes.get(Outcome.REFUSED, 0) > 0) == (load > 1.5)


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    setup, load = Setup(replicas=4, costs=COSTS), workload(0.8, 4)
    assert simulate(setup, load, seed=3) == simulate(setup, load, seed=3)
    assert simulate(setup, load, seed=3) != simulate(setup, load, seed=4)


def test_least_request_beats_random() -> None:
    found = {
        policy: simulate(Setup(replicas=16, costs=COSTS, policy=policy), workload(0.9, 16))
        for policy in (Random, LeastRequest)
    }
    assert found[LeastRequest].first_token_p99 < 0.8 * found[Random].first_token_p99
    assert found[LeastRequest].imbalance < found[Random].imbalance


def test_affinity_finds_what_least_request_does_not() -> None:
    sessions = workload(0.2, 16, shared_tokens=512, own_tokens=64, num_sessions=320)
    warm = replace(sessions, num_earlier=3000)
    found = {
        name: simulate(Setup(replicas=16, costs=COSTS, policy=policy), warm).hit_share
        for name, policy in (
            ("least", LeastRequest),
            ("bound", ring_hash(2)),
            ("ring", ring_hash()),
        )
    }
    assert found["least"] < 0.3 < 0.7 < found["bound"] <= found["ring"]


def test_a_bound_keeps_a_session_that_all_ask_for_from_filling_one_replica() -> None:
    one = workload(0.7, 8, num_sessions=1)
    free = simulate(Setup(replicas=8, costs=COSTS, policy=ring_hash()), one)
    bound = simulate(Setup(replicas=8, costs=COSTS, policy=ring_hash(1.25)), one)
    assert free.imbalance == pytest.approx(8)
    assert free.share(Outcome.REFUSED) > 0.5
    assert bound.imbalance < 1.3
    assert bound.share(Outcome.REFUSED) == 0


def test_retries_save_calls_that_meet_a_dead_replica() -> None:
    failures = Failures(mean_life_s=20, repair_s=10, detect_s=3)
    lost = [
        simulate(
            Setup(replicas=8, costs=COSTS, failures=failures, retries=retries), workload(0.5, 8)
        ).share(Outcome.UNAVAILABLE)
        for retries in (0, 3)
    ]
    assert lost[0] > 0.01
    assert lost[1] < lost[0] / 5


def test_a_smaller_queue_trades_waiting_for_refusals() -> None:
    short, long = (
        simulate(
            Setup(replicas=4, costs=COSTS, limits=Limits(max_concurrent_requests=limit)),
            workload(1.3, 4),
        )
        for limit in (36, 200)
    )
    assert short.first_token_p99 < long.first_token_p99
    assert short.share(Outcome.REFUSED) > long.share(Outcome.REFUSED)


def test_too_few_processors_of_envoy_are_what_is_full() -> None:
    slow = replace(COSTS, envoy=replace(COSTS.envoy, per_token_s=100 * COSTS.envoy.per_token_s))
    narrow = simulate(Setup(replicas=8, costs=slow, envoy_cores=1), workload(0.5, 8))
    wide = simulate(Setup(replicas=8, costs=slow, envoy_cores=16), workload(0.5, 8))
    assert narrow.envoy_use == pytest.approx(1, abs=0.05)
    assert narrow.first_token_p99 > 10 * wide.first_token_p99
