"""Random numbers are a pure function of seed and position, and uniformly distributed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.random_numbers import uniform

SEEDS = [0, 1, 2, 42, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
_MASK = 2**64 - 1


def draw(seeds: list[int], positions: list[int]) -> Tensor:
    """The numbers for unsigned seeds."""
    return torch.from_numpy(uniform(seeds, positions))


def mix(state: int) -> int:
    """SplitMix64's mixing function on Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def kolmogorov_smirnov(numbers: Tensor) -> float:
    """The probability that uniform numbers deviate this much or more (Kolmogorov's limit)."""
    n = numbers.numel()
    ordered = numbers.sort().values
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - ordered
    below = ordered - torch.arange(n, dtype=torch.float64) / n
    x = math.sqrt(n) * float(torch.maximum(above.max(), below.max()))
    return 2 * sum((-1.0) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, _MASK), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_matches_the_published_function_on_whole_numbers(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = zip(*pairs, strict=True)
    gamma = 0x9E3779B97F4A7C15
    expected = [
        (mix((mix(seed) + (position + 1) * gamma) & _MASK) >> 11) * 2.0**-53
        for seed, position in pairs
    ]
    numbers = draw(list(seeds), list(positions)).tolist()
    assert numbers == expected
    assert all(0 <= number < 1 for number in numbers)


def test_a_number_does_not_depend_on_the_others_drawn_with_it() -> None:
    together = draw(SEEDS * 4, list(range(len(SEEDS) * 4)))
    alone = [draw([seed], [at]).item() for at, seed in enumerate(SEEDS * 4)]
    assert together.tolist() == alone


# With random seeds, each of the 12 cases below would fail with probability 1e-6. Seeds are fixed,
# so they fail only if the function changes.
_FALSE_ALARM = 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_of_one_seed_are_evenly_spread(seed: int) -> None:
    n = 20_000
    assert kolmogorov_smirnov(draw([seed] * n, list(range(n)))) > _FALSE_ALARM


@pytest.mark.parametrize("position", [0, 1, 5, 4096])
def test_seeds_in_a_row_are_evenly_spread(position: int) -> None:
    n = 20_000
    assert kolmogorov_smirnov(draw(list(range(n)), [position] * n)) > _FALSE_ALARM


def test_neighbours_are_not_correlated() -> None:
    n = 20_000
    numbers = draw([7] * n + list(range(n)), [*range(n), *[3] * n]).view(2, n)
    for row in numbers:
        correlation = torch.corrcoef(torch.stack([row[:-1], row[1:]]))[0, 1]
        # Five standard deviations: a false alarm has probability 6e-7.
        assert abs(float(correlation)) < 5 / math.sqrt(n)


def test_seeds_at_the_ends_of_the_range_differ() -> None:
    positions = list(range(100))
    streams = {tuple(draw([seed] * 100, positions).tolist()) for seed in SEEDS}
    assert len(streams) == len(SEEDS)
