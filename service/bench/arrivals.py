"""When the requests of an open loop are due."""

from __future__ import annotations

import itertools
import random


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Returns seconds from the start, the first 0: users who do not know of each other.

    Args:
        rate: arrivals per second on average.
        count: how many.
        seed: the same seed and rate give the same times.
    """
    generator = random.Random(seed)  # noqa: S311 - nothing secret
    gaps = (generator.expovariate(rate) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))
