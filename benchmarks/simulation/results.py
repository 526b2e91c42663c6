"""What a simulation counts, and what comes of it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .call import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one simulation. Latencies are seconds, from a call's arrival at Envoy and to its exit.

    Attributes:
        arrived: calls.
        outcomes: how many of them ended how.
        retried: how often a call was given to another replica.
        deaths: of replicas.
        tokens_per_s: generated for calls that were completed, by the seconds in which calls came.
        first_token_mean: time to the first token, on average.
        first_token_p50: time to the first token: half of the calls have it sooner.
        first_token_p99: 99 of 100 have it sooner.
        gap_p50: time between tokens.
        gap_p99: 99 of 100 come sooner.
        envoy_use: the part of Envoy's processors that is busy, up to the last token.
        replica_use: the part of the replicas' time in which steps run, on average.
        imbalance: what the busiest replica has done, by the mean.
        hit_share: the part of the shared beginnings that was found in caches.
    """

    arrived: int
    outcomes: dict[Outcome, int]
    retried: int
    deaths: int
    tokens_per_s: float
    first_token_mean: float
    first_token_p50: float
    first_token_p99: float
    gap_p50: float
    gap_p99: float
    envoy_use: float
    replica_use: float
    imbalance: float
    hit_share: float

    def share(self, outcome: Outcome) -> float:
        """The part of all calls that ended so."""
        return self.outcomes.get(outcome, 0) / self.arrived


@dataclass(slots=True)
class Counts:
    """What is counted while it runs; numbers in arrays, of which there may be millions."""

    arrived: int = 0
    retried: int = 0
    deaths: int = 0
    generated_tokens: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    first_tokens: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    gap_counts: array[float] = field(default_factory=lambda: array("d"))

    def add_gaps(self, seconds: float, count: int) -> None:
        """So many rows waited so long for their next token."""
        self.gaps.append(seconds)
        self.gap_counts.append(count)

    def result(
        self,
        *,
        duration_s: float,
        envoy_use: float,
        busy_s: Sequence[float],
        hit_tokens: int,
        shared_tokens: int,
    ) -> Result:
        """Sums up."""
        ones = np.ones(len(self.first_tokens))
        first = quantiles(np.asarray(self.first_tokens), ones, (0.5, 0.99))
        gap = quantiles(np.asarray(self.gaps), np.asarray(self.gap_counts), (0.5, 0.99))
        mean_busy_s = sum(busy_s) / len(busy_s)
        return Result(
            arrived=self.arrived,
            outcomes=dict(self.outcomes),
            retried=self.retried,
            deaths=self.deaths,
            tokens_per_s=self.generated_tokens / duration_s,
            first_token_mean=sum(self.first_tokens) / max(len(self.first_tokens), 1),
            first_token_p50=first[0],
            first_token_p99=first[1],
            gap_p50=gap[0],
            gap_p99=gap[1],
            envoy_use=envoy_use,
            replica_use=mean_busy_s / duration_s,
            imbalance=max(busy_s) / mean_busy_s if mean_busy_s else 1.0,
            hit_share=hit_tokens / shared_tokens if shared_tokens else 0.0,
        )


def quantiles(
    values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], shares: Sequence[float]
) -> list[float]:
    """The least values that at least such a share of the weights does not exceed; 0 of none."""
    if not len(values):
        return [0.0 for _ in shares]
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    at = np.searchsorted(reached, np.asarray(shares) * reached[-1])
    return [float(value) for value in values[order][at]]
