"""When the requests of an open loop are due."""

from __future__ import annotations

import itertools
import random


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Returns arrival times of independent users, in seconds from the first, which is at 0.

    Args:
        rate: arrivals per second on average.
        count: number of arrivals.
        seed: the same seed and rate give the same times.
    """
    generator = random.Random(seed)  # noqa: S311 - nothing secret
    gaps = (generator.expovariate(rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))
