"""How Envoy chooses a replica. Each Envoy has a balancer, and knows of its own calls only."""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

MIN_RING_SIZE = 1024  # Envoy's default of `minimum_ring_size`


class Hosts:
    """The replicas as one Envoy sees them.

    Args:
        count: how many there are; they are named by numbers from 0.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.active = [0] * count
        self.total_active = 0
        self.healthy = [*range(count)]
        self.is_healthy = [True] * count

    def started(self, host: int) -> None:
        """A call was given to it."""
        self.active[host] += 1
        self.total_active += 1

    def ended(self, host: int) -> None:
        """A call of it has ended."""
        self.active[host] -= 1
        self.total_active -= 1

    def mark(self, host: int, is_healthy: bool) -> None:
        """What its health check says."""
        self.is_healthy[host] = is_healthy
        self.healthy = [host for host in range(self.count) if self.is_healthy[host]]


class Balancer(Protocol):
    """Chooses among the healthy hosts, of which there is at least one."""

    def choose(self, key: int, attempt: int) -> int:
        """The host for a call with this key; `attempt` counts the choices for the same call."""


class Random:
    """Any host (`RANDOM`)."""

    def __init__(self, hosts: Hosts, generator: random.Random) -> None:
        self._hosts, self._random = hosts, generator

    def choose(self, key: int, attempt: int) -> int:
        """See Balancer."""
        return self._random.choice(self._hosts.healthy)


class LeastRequest:
    """Of two random hosts the one with fewer calls (`LEAST_REQUEST`, `choice_count` 2)."""

    def __init__(self, hosts: Hosts, generator: random.Random) -> None:
        self._hosts, self._random = hosts, generator

    def choose(self, key: int, attempt: int) -> int:
        """See Balancer."""
        one, other = self._random.choices(self._hosts.healthy, k=2)
        return one if self._hosts.active[one] <= self._hosts.active[other] else other


class RingHash:
    """The host whose place on a ring follows the key's (`RING_HASH`), with a bound on its load.

    Each host has the same number of places, so many that there are `MIN_RING_SIZE` at least. With
    `bound` (a hundredth of Envoy's `hash_balance_factor`), a host that has more calls than `bound`
    times the mean is passed over for the first of all hosts, in an order that the key decides, that
    has not. It is that order and not the ring's, so that neighbours of a busy host are no busier.
    See https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing and
    Mirrokni, Thorup, Zadimoghaddam, Consistent hashing with bounded loads, 2016.

    Args:
        hosts: all hosts.
        bound: at least 1; None sets no bound.
        ring_size: places at least.
    """

    def __init__(
        self, hosts: Hosts, bound: float | None = None, ring_size: int = MIN_RING_SIZE
    ) -> None:
        self._hosts = hosts
        self._bound = bound
        places = math.ceil(ring_size / hosts.count)
        ring = sorted(
            (_hash("host", host, n), host) for host in range(hosts.count) for n in range(places)
        )
        self._places = [place for place, _ in ring]
        self._owners = [host for _, host in ring]

    def choose(self, key: int, attempt: int) -> int:
        """See Balancer."""
        place = _hash("key", key, attempt)
        host = self._owner(place)
        if self._bound is None or self._overload(host) <= 1:
            return host
        return self._other(host, place)

    def _owner(self, place: int) -> int:
        at = bisect_left(self._places, place) % len(self._places)
        while not self._hosts.is_healthy[self._owners[at]]:
            at = (at + 1) % len(self._places)
        return self._owners[at]

    def _overload(self, host: int) -> float:
        """Its calls by those that it may have."""
        assert self._bound is not None
        hosts = self._hosts
        slots = math.ceil((hosts.total_active + 1) * self._bound / len(hosts.healthy))
        return hosts.active[host] / max(slots, 1)

    def _other(self, host: int, place: int) -> int:
        """The first that is not overloaded, else the least overloaded one."""
        generator, healthy = random.Random(place), self._hosts.healthy
        for _ in healthy:  # as good as a shuffled list, and soon at an end
            other = generator.choice(healthy)
            if self._overload(other) <= 1:
                return other
        return min(healthy, key=self._overload, default=host)


def _hash(kind: str, *numbers: int) -> int:
    text = f"{kind}{numbers}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


Policy = Callable[[Hosts, random.Random], Balancer]
"""Makes a balancer."""


def ring_hash(bound: float | None = None, ring_size: int = MIN_RING_SIZE) -> Policy:
    """A policy of ring hash."""
    return lambda hosts, _: RingHash(hosts, bound, ring_size)
