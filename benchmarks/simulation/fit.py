"""What things take, from how long their sums took: least squares without negative costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs that explain measured seconds.

    Attributes:
        seconds: of one of each thing.
        median_error: by how much of it a measured time is off, of the better half at most.
        p90_error: the same of 90 %.
    """

    seconds: dict[str, float]
    median_error: float
    p90_error: float


def fit(names: Sequence[str], counts: Sequence[Sequence[float]], seconds: Sequence[float]) -> Fit:
    """Finds the costs, none below 0, with the least sum of squares of relative errors.

    With few unknowns the sure way is the shortest one: the best solution without negative costs is
    a plain one of some subset of the unknowns (the others are 0), so all subsets are tried.

    Args:
        names: of the unknowns.
        counts: how much of each of them was in what was measured; a row for each measurement.
        seconds: how long that took.
    """
    taken = np.asarray(seconds)
    shares = np.asarray(counts) / taken[:, None]  # relative: short steps count as long ones do
    best = min(_candidates(shares), key=lambda costs: float(_squares(shares, costs)))
    errors = np.abs(shares @ best - 1)
    return Fit(
        dict(zip(names, map(float, best), strict=True)),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
    )


def _candidates(shares: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    found = []
    width = shares.shape[1]
    for size in range(1, width + 1):
        for columns in map(list, itertools.combinations(range(width), size)):
            costs = np.zeros(width)
            costs[columns] = np.linalg.lstsq(shares[:, columns], np.ones(len(shares)))[0]
            if (costs >= 0).all():
                found.append(costs)
    return found


def _squares(shares: npt.NDArray[np.float64], costs: npt.NDArray[np.float64]) -> float:
    return float(((shares @ costs - 1) ** 2).sum())
