"""Numbers of one form: an interval, multiples, and whether they are integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Number = int | float


@dataclass(frozen=True, slots=True)
class NumberForm:
    """Numbers that are all of this.

    Attributes:
        low, high: the bounds, None without one; an `open` bound is not itself allowed.
        is_integer: whether they are integers or are not; None for either.
        factor: all are multiples of it.
        values: all that there may be, if they are listed.
    """

    low: Number | None = None
    is_low_open: bool = False
    high: Number | None = None
    is_high_open: bool = False
    is_integer: bool | None = None
    factor: Fraction | None = None
    values: frozenset[Number] | None = None

    def met(self, other: NumberForm) -> NumberForm | None:
        """What is of both forms; None if nothing is."""
        if None not in (self.is_integer, other.is_integer) and self.is_integer != other.is_integer:
            return None
        low, is_low_open = max(self._lower, other._lower)
        high, is_high_open = min(self._upper, other._upper)
        both = NumberForm(
            None if low == -math.inf else low,
            bool(is_low_open),
            None if high == math.inf else high,
            bool(-is_high_open),
            other.is_integer if self.is_integer is None else self.is_integer,
            _common_multiple(self.factor, other.factor),
            _common(self.values, other.values),
        )
        return both._within() if both.values is not None else both._checked()

    @property
    def _lower(self) -> tuple[Number, int]:
        return (-math.inf, 0) if self.low is None else (self.low, self.is_low_open)

    @property
    def _upper(self) -> tuple[Number, int]:
        return (math.inf, 0) if self.high is None else (self.high, -self.is_high_open)

    def _within(self) -> NumberForm | None:
        """The listed values that are of this form, and nothing else."""
        values = frozenset(value for value in self.values or () if self.has(value))
        return NumberForm(values=values) if values else None

    def has(self, value: Number) -> bool:
        """Whether a number is of this form."""
        low, high = self._lower, self._upper
        if not (low[0] < value or (low[0] == value and not low[1])):
            return False
        if not (value < high[0] or (value == high[0] and not high[1])):
            return False
        exact = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
        if self.is_integer is not None and (exact.denominator == 1) != self.is_integer:
            return False
        if self.factor is not None and exact % self.factor:
            return False
        return self.values is None or value in self.values

    def _checked(self) -> NumberForm | None:
        if self.low is None or self.high is None:
            return self
        if self.low == self.high:
            return NumberForm(values=frozenset([self.low])).met(self) if self._is_closed else None
        return self if self.low < self.high else None

    @property
    def _is_closed(self) -> bool:
        return not (self.is_low_open or self.is_high_open)

    def schema(self) -> dict[str, Any]:
        """The keywords that say it, without `is_integer` being false."""
        said: dict[str, Any] = {"type": "integer" if self.is_integer else "number"}
        if self.low is not None:
            said["exclusiveMinimum" if self.is_low_open else "minimum"] = self.low
        if self.high is not None:
            said["exclusiveMaximum" if self.is_high_open else "maximum"] = self.high
        if self.factor is not None:
            whole = self.factor.denominator == 1
            said["multipleOf"] = int(self.factor) if whole else float(self.factor)
        return said


def _common(one: frozenset[Any] | None, other: frozenset[Any] | None) -> frozenset[Any] | None:
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _common_multiple(one: Fraction | None, other: Fraction | None) -> Fraction | None:
    if one is None or other is None:
        return one if other is None else other
    denominator = math.lcm(one.denominator, other.denominator)
    numerators = (int(one * denominator), int(other * denominator))
    return Fraction(math.lcm(*numerators), denominator)
