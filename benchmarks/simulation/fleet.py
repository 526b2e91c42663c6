"""Envoy in front of replicas: the way of a call, and what is counted on it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from .balancers import Balancer, Hosts, LeastRequest, Policy
from .calendar import Calendar
from .call import Call, Outcome
from .costs import Costs
from .prefix_cache import BLOCK_TOKENS
from .replica import Limits, Replica, StepEnd
from .results import Counts, Result
from .station import Station
from .workload import Workload

_MAX_CHOICES = 20  # for a retry elsewhere, as Envoy's `host_selection_retry_max_attempts`


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How replicas die. Times are seconds.

    Attributes:
        mean_life_s: of a replica, on average; lives are exponential.
        repair_s: until it takes calls again, with empty caches.
        detect_s: until health checks tell Envoy of a death.
    """

    mean_life_s: float
    repair_s: float = 30.0
    detect_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A fleet.

    Attributes:
        replicas: how many.
        costs: what everything takes.
        policy: how Envoy chooses.
        limits: of each replica.
        workers: service processes of each replica.
        envoys: how many there are, which do not know of each other's calls.
        envoy_cores: processors of all of them together, which share the work as if they had one
            queue; really each has its own, which is a little worse.
        retries: choices after the first, for calls that have not been answered with a byte; Envoy's
            `num_retries` in our configuration.
        failures: how replicas die; None if they do not.
    """

    replicas: int
    costs: Costs
    policy: Policy = LeastRequest
    limits: Limits = field(default_factory=Limits)
    workers: int = 1
    envoys: int = 1
    envoy_cores: int = 2
    retries: int = 3
    failures: Failures | None = None


def simulate(setup: Setup, workload: Workload, seed: int = 0) -> Result:
    """Runs a workload to the end of its last call; the same seed gives the same result."""
    fleet = _Fleet(setup, workload, seed)
    return fleet.run()


class _Fleet:
    def __init__(self, setup: Setup, workload: Workload, seed: int) -> None:
        self._setup, self._workload, self._seed = setup, workload, seed
        self._random = random.Random(f"fleet {seed}")
        self._calendar = Calendar()
        self._envoy = Station(setup.envoy_cores, setup.costs.envoy.idle_share)
        self._hosts = [Hosts(setup.replicas) for _ in range(setup.envoys)]
        self._balancers: list[Balancer] = [
            setup.policy(hosts, self._random) for hosts in self._hosts
        ]
        self._services = [
            Station(setup.workers, setup.costs.service.idle_share) for _ in range(setup.replicas)
        ]
        self._replicas = [self._replica(host) for host in range(setup.replicas)]
        self._last_exit = [0.0] * setup.replicas
        self._counts = Counts()

    def _replica(self, host: int) -> Replica:
        setup = self._setup
        on_step = partial(self._stepped, host)
        return Replica(self._calendar, setup.costs.step, setup.limits, on_step)

    def run(self) -> Result:
        """Runs until nothing is left."""
        self._warm()
        self._expect(self._workload.calls(self._seed))
        if self._setup.failures is not None:
            for host in range(self._setup.replicas):
                self._expect_death(host, self._setup.failures)
        self._calendar.run()
        return self._counts.result(
            duration_s=self._workload.duration_s,
            envoy_use=self._envoy.busy_s / self._envoy.num_cores / self._envoy.idle_from,
            busy_s=[replica.busy_s for replica in self._replicas],
            hit_tokens=sum(replica.hit_tokens for replica in self._replicas),
            shared_tokens=sum(replica.shared_tokens for replica in self._replicas),
        )

    def _warm(self) -> None:
        """Fills the caches with what calls before the first one have left there."""
        earlier = self._workload.endless(self._seed + 1)
        for call in itertools.islice(earlier, self._workload.num_earlier):
            host = self._balancers[0].choose(call.session, 0)
            self._replicas[host].cache.keep(call.session, call.shared_tokens // BLOCK_TOKENS)

    # A call on its way in

    def _expect(self, calls: Iterator[Call]) -> None:
        call = next(calls, None)
        if call is not None:
            self._calendar.at(call.arrived, lambda: self._arrive(call, calls))

    def _arrive(self, call: Call, others: Iterator[Call]) -> None:
        self._expect(others)
        self._counts.arrived += 1
        call.envoy = self._random.randrange(self._setup.envoys)
        self._route(call)

    def _route(self, call: Call) -> None:
        """Envoy's work, then its choice."""
        done = self._envoy.finish(self._calendar.now, self._setup.costs.envoy.per_call_s)
        self._calendar.at(done, lambda: self._choose(call))

    def _choose(self, call: Call) -> None:
        host = self._untried(call)
        if host is None:
            self._end(call, Outcome.UNAVAILABLE)
        elif not self._replicas[host].is_up:  # its port refuses connections
            self._retry(call, host)
        elif self._replicas[host].is_full:
            self._end(call, Outcome.REFUSED)
        else:
            self._give(call, host)

    def _untried(self, call: Call) -> int | None:
        if not self._hosts[call.envoy].healthy:
            return None
        balancer, tried = self._balancers[call.envoy], len(call.tried)
        for attempt in range(tried, tried + _MAX_CHOICES):
            host = balancer.choose(call.session, attempt)
            if host not in call.tried:
                break
        return host

    def _retry(self, call: Call, host: int) -> None:
        call.tried.append(host)
        if len(call.tried) > self._setup.retries:
            self._end(call, Outcome.UNAVAILABLE)
        else:
            self._counts.retried += 1
            self._route(call)

    def _give(self, call: Call, host: int) -> None:
        self._hosts[call.envoy].started(host)
        self._replicas[host].submit(call)

    # Tokens on their way out

    def _stepped(self, host: int, step: StepEnd) -> None:
        """The service's work, then Envoy's."""
        if not step.num_tokens:
            return
        service = self._setup.costs.service
        work = service.per_token_s * step.num_tokens + service.per_call_s * len(step.first)
        done = self._services[host].finish(self._calendar.now, work)
        self._calendar.at(done, lambda: self._send(host, step))

    def _send(self, host: int, step: StepEnd) -> None:
        work = self._setup.costs.envoy.per_token_s * step.num_tokens
        at = self._envoy.finish(self._calendar.now, work)
        num_gaps = step.num_tokens - len(step.first)
        if num_gaps:
            self._counts.add_gaps(at - self._last_exit[host], num_gaps)
        self._last_exit[host] = at
        for call in step.first:
            call.first_token = at
            self._counts.first_tokens.append(at - call.arrived)
        if step.last:
            self._calendar.at(at, lambda: self._complete(host, step.last))

    def _complete(self, host: int, calls: list[Call]) -> None:
        for call in calls:
            self._hosts[call.envoy].ended(host)
            self._counts.generated_tokens += call.new_tokens
            self._end(call, Outcome.COMPLETED)

    def _end(self, call: Call, outcome: Outcome) -> None:
        assert call.outcome is None
        call.outcome = outcome
        self._counts.outcomes[outcome] += 1

    # Replicas die

    def _expect_death(self, host: int, failures: Failures) -> None:
        dies = self._calendar.now + self._random.expovariate(1 / failures.mean_life_s)
        if dies < self._workload.duration_s:
            self._calendar.at(dies, lambda: self._die(host, failures))

    def _die(self, host: int, failures: Failures) -> None:
        self._counts.deaths += 1
        now = self._calendar.now
        for call in self._replicas[host].die():
            self._hosts[call.envoy].ended(host)
            if call.started_step < 0:
                self._retry(call, host)
            else:
                self._end(call, Outcome.BROKEN)
        self._calendar.at(now + failures.detect_s, lambda: self._mark(host, False))
        self._calendar.at(now + failures.repair_s, lambda: self._revive(host, failures))

    def _mark(self, host: int, is_healthy: bool) -> None:
        for hosts in self._hosts:
            hosts.mark(host, is_healthy)

    def _revive(self, host: int, failures: Failures) -> None:
        self._replicas[host].is_up = True
        self._mark(host, True)
        self._expect_death(host, failures)
