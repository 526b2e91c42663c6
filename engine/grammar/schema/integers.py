"""Integers of any size as regular expressions, which keep every digit."""

from __future__ import annotations

from typing import Any

from .keywords import ANNOTATIONS, Schema, types_of
from .numbers import LARGEST, integer_bounds, is_exact

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_CHOICE = {"enum", "const", "type"}


def exact_integers(schema: Schema) -> str | None:
    """The regular expression of a schema that allows integers alone, if others would round them."""
    kept = {key: schema[key] for key in schema if key not in ANNOTATIONS}
    types = types_of(kept)
    choices = kept.get("enum", [kept.get("const")])
    if kept.keys() <= _CHOICE and types <= {"integer", "number"} and _are_integers(choices):
        is_needed = not all(is_exact(choice, is_value=True) for choice in choices)
        return "|".join(map(str, choices)) if is_needed else None
    if types != {"integer"} or not kept.keys() <= {"type", *_BOUNDS}:
        return None
    low, high = integer_bounds(kept)
    if all(bound is None or _is_small(bound) for bound in (low, high)):
        return None
    low = -max(LARGEST, 100 * abs(high or 0)) if low is None else low
    high = max(LARGEST, 100 * abs(low)) if high is None else high
    return integer_regex(low, high) if low <= high else None


def _are_integers(choices: Any) -> bool:
    return isinstance(choices, list) and bool(choices) and all(type(c) is int for c in choices)


def _is_small(bound: int) -> bool:
    return abs(bound) <= LARGEST and is_exact(bound)


def integer_regex(low: int, high: int) -> str:
    """The expression of the integers from `low` to `high`, without leading zeros."""
    forms = []
    if low < 0:
        forms.append(f"-(?:{_naturals(max(1, -high), -low)})")
    if high >= 0:
        forms.append(_naturals(max(0, low), high))
    return "|".join(forms)


def _naturals(low: int, high: int) -> str:
    """The expression of the natural numbers from `low` to `high`, one form per number of digits."""
    forms = []
    for length in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (length - 1) if length > 1 else 0)
        most = min(high, 10**length - 1)
        forms.append(_digits(str(least), str(most)))
    return "|".join(forms)


def _digits(low: str, high: str) -> str:
    """The expression of the texts of digits from `low` to `high`, which are of the same length."""
    if not low:
        return ""
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{low[0]}-{high[0]}]" + (f"[0-9]{{{rest}}}" if rest else "")
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    first, last = int(low[0]), int(high[0])
    forms = [low[0] + _digits(low[1:], "9" * rest)]
    if last - first > 1:
        forms.append(f"[{first + 1}-{last - 1}][0-9]{{{rest}}}")
    forms.append(high[0] + _digits("0" * rest, high[1:]))
    return f"(?:{'|'.join(forms)})"
