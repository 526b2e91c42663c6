"""Random numbers that are a pure function of (seed, position).

So a token does not depend on what else is in the batch, on a preemption or on a restart.
"""

from __future__ import annotations

from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [n], for seeds and positions int64 [n].

    The mixing function is that of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom
    number generators, OOPSLA 2014), applied once to the seed and once to its stream's position.
    """
    bits = _mix(_mix(seeds) + (positions + 1) * _GAMMA)
    return (_shift(bits, 11)).double() * 2.0**-53


def to_signed(seed: int) -> int:
    """The signed 64-bit number with the bits of an unsigned one: torch has no uint64 arithmetic."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shift(state, 27)) * _MULTIPLIER_2
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros; torch's own shift repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
