"""Random numbers that are a pure function of (seed, position).

So a token does not depend on the other requests of a batch, on a preemption or on a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 [n], for n unsigned seeds of 64 bits and n positions.

    The mixing function is that of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom
    number generators, OOPSLA 2014), applied once to the seed and once to its stream's position.
    """
    steps = np.array(positions, dtype=np.uint64) + np.uint64(1)
    bits = _mix(_mix(np.array(seeds, dtype=np.uint64)) + steps * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The mixing function of SplitMix64; its arithmetic is modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))
