"""Whether no value fits two of several schemas: then a `oneOf` of them is an `anyOf`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from .keywords import Schema, items, strings, types_of

_KINDS = frozenset(("null", "boolean", "number", "string", "array", "object"))
_MAX_PAIRS = 5000  # compared one by one
_Values = frozenset[Hashable]


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is known of the values that fit a schema.

    Attributes:
        kinds: their types; an integer is a number.
        values: all of them, if they are listed.
        tags: properties that each of them has, with all values that these may have.
    """

    kinds: frozenset[str] = _KINDS
    values: _Values | None = None
    tags: dict[str, _Values] = field(default_factory=dict)

    def is_apart(self, other: _Summary) -> bool:
        """Whether no value fits both."""
        if self.kinds.isdisjoint(other.kinds):
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        if (self.kinds & other.kinds) != {"object"}:
            return False
        shared = self.tags.keys() & other.tags.keys()
        return any(self.tags[name].isdisjoint(other.tags[name]) for name in shared)


def are_apart(schemas: Sequence[Any], follow: Callable[[str], Any]) -> bool:
    """Whether no value fits two of these schemas, as far as can be told.

    Args:
        schemas: the schemas.
        follow: what a reference leads to; None if to nothing.
    """
    summaries = [_summary(schema, follow, ()) for schema in schemas]
    if _are_distinct([summary.values for summary in summaries]):
        return True
    shared = set.intersection(*(set(summary.tags) for summary in summaries)) if summaries else set()
    if all(summary.kinds == {"object"} for summary in summaries) and any(
        _are_distinct([summary.tags[name] for summary in summaries]) for name in shared
    ):
        return True
    pairs = len(summaries) * (len(summaries) - 1) // 2
    return pairs <= _MAX_PAIRS and all(a.is_apart(b) for a, b in combinations(summaries, 2))


def _are_distinct(sets: list[_Values | None]) -> bool:
    known = [values for values in sets if values is not None]
    total = len(frozenset[Hashable]().union(*known))
    return len(known) == len(sets) and sum(map(len, known)) == total


def _summary(schema: Any, follow: Callable[[str], Any], seen: tuple[str, ...]) -> _Summary:
    if schema is False:
        return _Summary(frozenset(), frozenset())
    if not isinstance(schema, dict):
        return _Summary()
    known = _own_summary(schema, follow, seen)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        known = _both(known, _summary(follow(reference), follow, (*seen, reference)))
    for part in items(schema.get("allOf")):
        known = _both(known, _summary(part, follow, seen))
    for key in ("anyOf", "oneOf"):
        if parts := items(schema.get(key)):
            known = _both(known, _any([_summary(part, follow, seen) for part in parts]))
    return known


def _own_summary(schema: Schema, follow: Callable[[str], Any], seen: tuple[str, ...]) -> _Summary:
    kinds = frozenset("number" if name == "integer" else name for name in types_of(schema))
    known = _Summary(kinds or _KINDS)
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(listed, list):
        values = frozenset(map(_hashable, listed))
        kinds = known.kinds & {kind for kind, _ in values}
        known = replace(known, kinds=kinds, values=values)
    properties = schema.get("properties")
    if isinstance(properties, dict) and len(seen) < 8:
        tags = {
            name: _summary(properties[name], follow, (*seen, "")).values
            for name in strings(schema.get("required"))
            if name in properties
        }
        known = replace(known, tags={name: v for name, v in tags.items() if v is not None})
    return known


def _both(one: _Summary, other: _Summary) -> _Summary:
    """What fits both schemas."""
    values = one.values if other.values is None else other.values
    if one.values is not None and other.values is not None:
        values = one.values & other.values
    tags = {**one.tags, **other.tags}
    for name in one.tags.keys() & other.tags.keys():
        tags[name] = one.tags[name] & other.tags[name]
    return _Summary(one.kinds & other.kinds, values, tags)


def _any(summaries: list[_Summary]) -> _Summary:
    """What fits one of some schemas."""
    kinds = frozenset[str]().union(*(summary.kinds for summary in summaries))
    known = [summary.values for summary in summaries if summary.values is not None]
    values = frozenset[Hashable]().union(*known) if len(known) == len(summaries) else None
    names = set.intersection(*(set(summary.tags) for summary in summaries))
    tags = {
        name: frozenset[Hashable]().union(*(summary.tags[name] for summary in summaries))
        for name in names
    }
    return _Summary(kinds, values, tags)


def _hashable(value: Any) -> tuple[str, Hashable]:
    """A JSON value as one that compares as JSON does: 1 is 1.0, and not true."""
    if value is None:
        return "null", None
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, (int, float)):
        return "number", value
    if isinstance(value, str):
        return "string", value
    if isinstance(value, list):
        return "array", tuple(map(_hashable, value))
    return "object", frozenset((name, _hashable(item)) for name, item in value.items())
