"""The questions that the simulation is asked. Each study gives panels of lines, and nothing else.

A replica is the engine that `calibrate.py` measured: 124 M parameters on two cores, with 32 rows.
Rates are given as parts of `capacity`, the calls that full batches carry without a prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .balancers import LeastRequest, Policy, Random, ring_hash
from .call import Outcome
from .costs import Costs
from .fleet import Failures, Setup, simulate
from .replica import Limits
from .results import Result
from .workload import Workload

Line = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A diagram: lines by name, of points (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, Line] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """What a panel shows of each result: its label, its value, and whether its scale is log."""

    label: str
    of: Callable[[Result], float]
    log_y: bool = False


FIRST_TOKEN = Measure("first token, p99, s", lambda result: result.first_token_p99, log_y=True)
REFUSED = Measure("refused (429), part of calls", lambda result: result.share(Outcome.REFUSED))
UNAVAILABLE = Measure(
    "answered 503, part of calls", lambda result: result.share(Outcome.UNAVAILABLE)
)
HITS = Measure("part of shared tokens found in the cache", lambda result: result.hit_share)
BUSIEST = Measure("busiest replica, times the mean", lambda result: result.imbalance)
ENVOY_USE = Measure("part of Envoy's processors in use", lambda result: result.envoy_use)

Found = dict[str, list[tuple[float, Result]]]  # points by the name of their line


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is simulated; times are seconds.

    Attributes:
        replicas: numbers of replicas, for the questions about them.
        fleet: replicas of all other questions.
        calls: about how many calls each point takes at least.
        least_s: in which they come at least.
    """

    replicas: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    fleet: int = 32
    calls: int = 12_000
    least_s: float = 60.0


TINY = Scale(replicas=(1, 10), fleet=4, calls=100, least_s=5.0)


class Lab:
    """Runs simulations that differ in what a study asks.

    Args:
        costs: what was measured.
        scale: how much to simulate.
    """

    def __init__(self, costs: Costs, scale: Scale) -> None:
        self.costs, self.scale = costs, scale

    def run(
        self, load: float, setup: Setup, workload: Workload, least_s: float | None = None
    ) -> Result:
        """A fleet at a load, as a part of what its replicas carry without a prefix cache."""
        prompt_tokens = workload.shared_tokens + workload.own_tokens
        step, rows = setup.costs.step, setup.limits.max_batch_size
        rate = load * setup.replicas * step.calls_per_s(rows, prompt_tokens, workload.new_tokens)
        duration_s = max(least_s or self.scale.least_s, self.scale.calls / rate)
        return simulate(setup, replace(workload, rate=rate, duration_s=duration_s))

    def fleet(self, replicas: int | None = None, policy: Policy = LeastRequest) -> Setup:
        """Replicas behind Envoys that have processors to spare."""
        count = replicas or self.scale.fleet
        cores = 2 + count // 10
        return Setup(replicas=count, costs=self.costs, policy=policy, envoy_cores=cores)


PLAIN = Workload(rate=1, duration_s=1)
SESSIONS = Workload(rate=1, duration_s=1, shared_tokens=512, own_tokens=64, new_tokens=64)
"""Each session has 512 tokens of its own that all its calls begin with."""


def balancing(lab: Lab) -> list[Panel]:
    """Random, least request and ring hash, without anything to gain from affinity."""
    policies = {
        "random": Random,
        "least request of two": LeastRequest,
        "ring hash, 1,024 places": ring_hash(),
        "ring hash, 65,536 places": ring_hash(ring_size=65_536),
    }
    loads = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
    found = {
        name: [(load, lab.run(load, lab.fleet(policy=policy), PLAIN)) for load in loads]
        for name, policy in policies.items()
    }
    return _panels(
        found,
        *(FIRST_TOKEN, REFUSED),
        title=f"{lab.scale.fleet} replicas, no shared beginnings",
        x_label="load (part of what full batches carry)",
    )


_ENVOY_S = 10.0  # 1,000 replicas have many steps in it


def envoy(lab: Lab) -> list[Panel]:
    """Where Envoy's processors are full, and what an Envoy that knows a part of the calls loses."""
    found = {
        f"{cores} of Envoy's cores, replicas {speed} x as fast": [
            (count, lab.run(0.8, _small_envoy(lab, count, cores, speed), PLAIN, _ENVOY_S / speed))
            for count in lab.scale.replicas
            if count * speed <= max(lab.scale.replicas)
        ]
        for cores, speed in ((1, 1), (4, 1), (1, 10))
    }
    several = [
        (count, lab.run(0.9, replace(lab.fleet(), envoys=count), PLAIN))
        for count in (1, 2, 4, 8, 16, 32)
    ]
    blind = _panels(
        {"least request of two": several},
        replace(FIRST_TOKEN, log_y=False),
        title=f"Envoys that do not know of each other ({lab.scale.fleet} replicas, 90 %)",
        x_label="Envoys",
        log_x=True,
    )
    known = _panels(
        found,
        *(ENVOY_USE, FIRST_TOKEN),
        title="Envoy at 80 % load",
        x_label="replicas",
        log_x=True,
    )
    return [*known, *blind]


def _small_envoy(lab: Lab, replicas: int, cores: int, speed: int) -> Setup:
    costs = replace(lab.costs, step=lab.costs.step.faster(speed))
    return replace(lab.fleet(replicas), costs=costs, envoy_cores=cores)


_MOST_WITH_CACHES = 300  # replicas; more take minutes to fill


def sessions(replicas: int, per_replica: int, skew: float = 0.0) -> Workload:
    """Sessions for so many replicas, with caches as they are after a while."""
    count = replicas * per_replica
    earlier = _EARLIER * replicas
    return replace(SESSIONS, num_sessions=count, num_earlier=earlier, skew=skew)


_EARLIER = 400  # calls per replica: each of 100 sessions has come four times


def affinity(lab: Lab) -> list[Panel]:
    """Which part of shared beginnings is found, by replicas and by sessions per replica."""
    policies = {"least request": LeastRequest, "ring hash, bound 1.25": ring_hash(1.25)}
    counts = [count for count in lab.scale.replicas if count <= _MOST_WITH_CACHES]
    by_replicas = {
        f"{name}, {per_replica} sessions per replica": [
            (count, lab.run(0.6, lab.fleet(count, policy), sessions(count, per_replica)))
            for count in counts
        ]
        for name, policy in policies.items()
        for per_replica in (10, 100)
    }
    return _panels(
        by_replicas,
        *(HITS, FIRST_TOKEN, BUSIEST),
        title="512 of 576 tokens shared within a session, room for 64 sessions",
        x_label="replicas",
        log_x=True,
    )


def loads(lab: Lab) -> list[Panel]:
    """What affinity is worth at which load, and what it costs."""
    policies = {
        "least request": LeastRequest,
        "ring hash, bound 1.25": ring_hash(1.25),
        "ring hash, bound 2": ring_hash(2.0),
        "ring hash, no bound": ring_hash(),
    }
    count = lab.scale.fleet
    workload = sessions(count, 20, skew=0.8)
    found = {
        name: [
            (load, lab.run(load, lab.fleet(policy=policy), workload))
            for load in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
        ]
        for name, policy in policies.items()
    }
    return _panels(
        found,
        *(FIRST_TOKEN, REFUSED, BUSIEST),
        title=f"{count} replicas, {20 * count} sessions (Zipf 0.8)",
        x_label="load (part of what full batches carry without caches)",
    )


BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)


def bounds(lab: Lab) -> list[Panel]:
    """The bound on a replica's load with ring hash, for sessions that are not alike."""
    count = lab.scale.fleet
    skews = {"all alike": 0.0, "Zipf 0.8": 0.8, "Zipf 1.1": 1.1}
    found = {
        f"{name}, load {load:.0%}": [
            (bound, lab.run(load, lab.fleet(policy=ring_hash(bound)), sessions(count, 20, skew)))
            for bound in BOUNDS
        ]
        for name, skew in skews.items()
        for load in (0.6, 1.4)
    }
    return _panels(
        found,
        *(FIRST_TOKEN, HITS),
        title=f"{count} replicas, {20 * count} sessions",
        x_label="bound (hash_balance_factor / 100)",
    )


def queues(lab: Lab) -> list[Panel]:
    """How many calls a replica should take, below and above what it carries."""
    limits = (32, 40, 48, 64, 96, 128, 256)
    found = {
        f"load {load:.0%}": [
            (limit, lab.run(load, _limited(lab, limit), PLAIN)) for limit in limits
        ]
        for load in (0.9, 1.0, 1.1, 1.3)
    }
    return _panels(
        found,
        *(FIRST_TOKEN, REFUSED),
        title=f"{lab.scale.fleet} replicas of 32 rows",
        x_label="--max-concurrent-requests of a replica",
        log_x=True,
    )


def _limited(lab: Lab, limit: int) -> Setup:
    return replace(lab.fleet(), limits=Limits(max_concurrent_requests=limit))


def failures(lab: Lab) -> list[Panel]:
    """What callers see of replicas that die, by how long they live."""
    lives = (60.0, 300.0, 900.0)
    longer_s = 4 * lab.scale.least_s
    found = {
        f"{retries} retries": [
            (life, lab.run(0.6, _mortal(lab, retries, life), PLAIN, longer_s)) for life in lives
        ]
        for retries in (0, 1, 3)
    }
    (lost,) = _panels(
        found,
        UNAVAILABLE,
        title=f"{lab.scale.fleet} replicas, back after 30 s, noticed after 5 s, 60 % load",
        x_label="mean life of a replica, s",
        log_x=True,
    )
    broken = replace(
        lost,
        title="the same",
        y_label="part of calls",
        lines={
            "streams that break": [
                (life, result.share(Outcome.BROKEN)) for life, result in found["3 retries"]
            ]
        },
    )
    return [lost, broken]


def _mortal(lab: Lab, retries: int, life_s: float) -> Setup:
    return replace(lab.fleet(), retries=retries, failures=Failures(mean_life_s=life_s))


def _panels(
    found: Found, *measures: Measure, title: str, x_label: str, log_x: bool = False
) -> list[Panel]:
    """A panel for each measure of the same results."""
    return [
        Panel(
            title="the same" if index else title,
            x_label=x_label,
            y_label=measure.label,
            lines={
                name: [(x, measure.of(result)) for x, result in results]
                for name, results in found.items()
            },
            log_x=log_x,
            log_y=measure.log_y,
        )
        for index, measure in enumerate(measures)
    ]


STUDIES: dict[str, Callable[[Lab], list[Panel]]] = {
    study.__name__: study for study in (balancing, envoy, affinity, loads, bounds, queues, failures)
}
