"""Numbers of a schema: exactly as they are written, or refused.

Libraries compute with float64 and with 64 bits. What they would round is refused here, and bounds
too far away to matter become bounds that they can enforce.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ...protocol.errors import GrammarError
from .keywords import VALUES, Schema, escaped, subschemas, types_of

# Numbers with a bound go no further, and neither do integers: so each has an end.
LARGEST = 10**18
# A number without any bound: 20 digits, as integers of 64 bits have, 20 behind the point, more than
# float64 holds, and exponents with which it stays finite. Without an end a model could write digits
# until it may write no more, and what it wrote would be no JSON.
FREE_NUMBER = (
    r"-?(?:(?:0|[1-9][0-9]{0,19})(?:\.[0-9]{1,20})?"
    r"(?:[eE](?:-[0-9]{1,3}|\+?(?:[01]?[0-9]{1,2}|2[0-7][0-9])))?"
    r"|[0-9](?:\.[0-9]{1,20})?[eE]\+?(?:2[0-9]{2}|30[0-7]))"  # these would be too large above
)
_SMALLEST = 1e-10  # the last digit of a number with bounds; the library counts 1e-11 wrongly …
_MIN_SPAN = 1e-6  # … and finds no multiples of it between bounds that are very near
_MINIMA = ("minimum", "exclusiveMinimum")
_MAXIMA = ("maximum", "exclusiveMaximum")
_MAX_FACTOR = 2**32 - 1  # of multipleOf, times a power of ten


def with_exact_numbers(schema: Schema, place: str, *, fill: bool) -> Schema:
    """A schema whose numbers are exact; with `fill`, those that could go on get an end.

    Raises:
        GrammarError: a number cannot be exact.
    """
    types = types_of(schema)
    if any(key in schema for key in VALUES):
        schema, fill = _with_values_in_bounds(schema), False
    for key in VALUES:
        if key in schema:
            _check_values(schema[key], f"{place}/{key}")
    if types and not types & {"integer", "number"}:
        return schema
    schema = {**schema, **_factor(schema, place)}
    if "integer" in types and "number" not in types:
        return _with_integer_bounds(schema, place, fill=fill)
    bounded = _with_number_bounds(schema, place)
    return _with_last_digits(bounded) if fill and "number" in types else bounded


def is_exact(number: Any, *, is_value: bool = False) -> bool:
    """Whether float64 holds a number; `is_value` says that it must also be written so."""
    if isinstance(number, float):
        return math.isfinite(number)
    if abs(number) > 2**1023 or int(float(number)) != number:
        return False
    return not is_value or abs(number) < 2**63


def integer_bounds(schema: Schema) -> tuple[int | None, int | None]:
    """The least and the largest integer within a schema's bounds."""
    low = [math.ceil(_number(schema, "minimum"))] if _has(schema, "minimum") else []
    if _has(schema, "exclusiveMinimum"):
        low.append(math.floor(_number(schema, "exclusiveMinimum")) + 1)
    high = [math.floor(_number(schema, "maximum"))] if _has(schema, "maximum") else []
    if _has(schema, "exclusiveMaximum"):
        high.append(math.ceil(_number(schema, "exclusiveMaximum")) - 1)
    return max(low, default=None), min(high, default=None)


def _with_values_in_bounds(schema: Schema) -> Schema:
    """A choice of values without bounds, and without those beyond them."""
    schema = _without_booleans(schema)
    values = schema.get("enum", [schema.get("const")])
    bounds = [key for key in (*_MINIMA, *_MAXIMA) if _has(schema, key)]
    if not bounds or not isinstance(values, list):
        return schema
    kept = {key: schema[key] for key in schema if key not in (*bounds, *VALUES)}
    return {**kept, "enum": [value for value in values if _is_within(value, schema)]}


def _is_within(value: Any, schema: Schema) -> bool:
    if type(value) not in (int, float):
        return True
    low = _has(schema, "minimum") and value < schema["minimum"]
    low = low or (_has(schema, "exclusiveMinimum") and value <= schema["exclusiveMinimum"])
    high = _has(schema, "maximum") and value > schema["maximum"]
    high = high or (_has(schema, "exclusiveMaximum") and value >= schema["exclusiveMaximum"])
    return not (low or high)


def _has(schema: Schema, key: str) -> bool:
    """Whether a bound is there. An infinite one is none, and comes from a number like 1e400."""
    bound = schema.get(key)
    return type(bound) is int or (type(bound) is float and math.isfinite(bound))


def _number(schema: Schema, key: str) -> Any:
    number = schema[key]
    return number if isinstance(number, int) else Fraction(repr(number))


def _check_values(value: Any, place: str) -> None:
    if type(value) in (int, float) and not is_exact(value, is_value=True):
        raise _inexact(value, place)
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(item, f"{place}/{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(item, f"{place}/{escaped(key)}")


def _with_integer_bounds(schema: Schema, place: str, *, fill: bool) -> Schema:
    """The bounds of an integer as `minimum` and `maximum`."""
    low, high = integer_bounds(_without_booleans(schema))
    kept = {key: schema[key] for key in schema if key not in (*_MINIMA, *_MAXIMA)}
    if low is not None and high is not None and low > high:
        raise GrammarError(f'no integer is between "minimum" and "maximum", at {place}')
    if fill or low is not None:
        kept["minimum"] = -LARGEST if low is None else max(low, -LARGEST)
    if fill or high is not None:
        kept["maximum"] = LARGEST if high is None else min(high, LARGEST)
    for key in ("minimum", "maximum"):
        if key in kept and (abs(kept[key]) > LARGEST or not is_exact(kept[key])):
            raise _inexact(kept[key], f"{place}/{key}")
    return kept


def _with_number_bounds(schema: Schema, place: str) -> Schema:
    kept = dict(_without_booleans(schema))
    for key in (*_MINIMA, *_MAXIMA):
        bound: Any = kept.get(key)
        if type(bound) not in (int, float):
            continue
        sign = -1 if key in _MINIMA else 1
        if sign * bound > LARGEST:  # too far away to matter
            del kept[key]
            nearer = "minimum" if sign < 0 else "maximum"
            kept.setdefault(nearer, sign * LARGEST)
        elif abs(bound) > LARGEST or not _is_printed(bound):
            raise _inexact(bound, f"{place}/{key}")
    return kept


def _with_last_digits(schema: Schema) -> Schema:
    """A number with a bound or a factor as one that has an end, before the point and after it."""
    low = max((schema[key] for key in _MINIMA if key in schema), default=None)
    high = min((schema[key] for key in _MAXIMA if key in schema), default=None)
    if low is None and high is None and "multipleOf" not in schema:
        return schema  # it may have an exponent: `engine/grammar/forms` writes it
    kept = dict(schema)
    if low is None:
        kept["minimum"] = low = -LARGEST
    if high is None:
        kept["maximum"] = high = LARGEST
    if high - low >= _MIN_SPAN:
        kept.setdefault("multipleOf", _SMALLEST)
    return kept


def add_ends(schema: Schema) -> None:
    """Bounds the numbers of a schema and of those in it that may have an exponent, which they lose.

    Values of which nothing is said keep theirs.
    """
    for _, inner in subschemas(schema):
        if "number" in types_of(inner) and inner.keys().isdisjoint(VALUES):
            inner.update(_with_last_digits({"minimum": -LARGEST, "maximum": LARGEST, **inner}))


def _without_booleans(schema: Schema) -> Schema:
    """Exclusive bounds of draft 4, which are booleans, as those of today."""
    kept = dict(schema)
    for exclusive, inclusive in (_MINIMA[::-1], _MAXIMA[::-1]):
        if isinstance(kept.get(exclusive), bool) and kept.pop(exclusive) and inclusive in kept:
            kept[exclusive] = kept.pop(inclusive)
    return kept


def _is_printed(bound: Any) -> bool:
    """Whether the shortest digits that mean the same float64 are those of the number itself."""
    return isinstance(bound, float) or Decimal(repr(float(bound))) == bound


def _factor(schema: Schema, place: str) -> Schema:
    """`multipleOf`, as an integer where the value is one.

    Raises:
        GrammarError: it has too many digits.
    """
    given: Any = schema.get("multipleOf")
    if type(given) not in (int, float):
        return {}
    if given <= 0:
        raise GrammarError(f'"multipleOf" must be above 0, at {place}')
    if not is_exact(given):
        raise _inexact(given, f"{place}/multipleOf")
    if types_of(schema) & {"integer", "number"} == {"integer"}:
        given = Fraction(repr(given)).numerator  # the integers among its multiples
    if not _has_few_digits(given):
        raise _inexact(given, f"{place}/multipleOf")
    return {"multipleOf": given}


def _has_few_digits(factor: float) -> bool:
    """Whether a factor stays exact while the library makes it an integer, as float64s."""
    scaled, exact = float(factor), Fraction(repr(factor))
    while scaled % 1:
        scaled, exact = scaled * 10, exact * 10
    return scaled == exact and scaled <= _MAX_FACTOR


def _inexact(number: Any, place: str) -> GrammarError:
    return GrammarError(f"the number {number} cannot be enforced exactly, at {place}")
