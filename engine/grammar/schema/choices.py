"""Whether no value fits two of several schemas: then a `oneOf` of them is an `anyOf`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from .keywords import Schema, items, strings, types_of

_KINDS = frozenset(("null", "boolean", "number", "string", "array", "object"))
_MAX_PAIRS = 5000  # compared one by one
_MAX_DEPTH = 6  # of references and properties that are looked into
_Values = frozenset[Hashable]


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is known of the values that fit a schema.

    Attributes:
        kinds: their types; an integer is a number.
        values: all of them, if they are listed.
        properties: what is known of the properties of objects.
        required: those that each object has.
    """

    kinds: frozenset[str] = _KINDS
    values: _Values | None = None
    properties: dict[str, _Summary] = field(default_factory=dict)
    required: frozenset[str] = frozenset()

    def tag(self, name: str) -> _Values | None:
        """The values that a property may have, which each object has."""
        return self.properties[name].values if name in self.tags else None

    @property
    def tags(self) -> set[str]:
        """The properties that each object has with one of some values."""
        known = {name for name in self.required if name in self.properties}
        return {name for name in known if self.properties[name].values is not None}

    def is_apart(self, other: _Summary) -> bool:
        """Whether no value fits both."""
        if self.kinds.isdisjoint(other.kinds):
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        if (self.kinds & other.kinds) != {"object"}:
            return False
        shared = self.properties.keys() & other.properties.keys()
        return any(
            self.properties[name].is_apart(other.properties[name])
            for name in shared & (self.required | other.required)
        )


def are_apart(schemas: Sequence[Any], follow: Callable[[str], Any]) -> bool:
    """Whether no value fits two of these schemas, as far as can be told.

    Args:
        schemas: the schemas.
        follow: what a reference leads to; None if to nothing.
    """
    summaries = [_summary(schema, follow, ()) for schema in schemas]
    if _are_distinct([summary.values for summary in summaries]):
        return True
    shared = set.intersection(*(summary.tags for summary in summaries)) if summaries else set()
    if all(summary.kinds == {"object"} for summary in summaries) and any(
        _are_distinct([summary.tag(name) for summary in summaries]) for name in shared
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
    if isinstance(properties, dict) and len(seen) < _MAX_DEPTH:
        inside = {name: _summary(properties[name], follow, (*seen, "")) for name in properties}
        required = frozenset(strings(schema.get("required")))
        known = replace(known, properties=inside, required=required)
    return known


def _both(one: _Summary, other: _Summary) -> _Summary:
    """What fits both schemas."""
    values = one.values if other.values is None else other.values
    if one.values is not None and other.values is not None:
        values = one.values & other.values
    properties = {**one.properties, **other.properties}
    for name in one.properties.keys() & other.properties.keys():
        properties[name] = _both(one.properties[name], other.properties[name])
    kinds = one.kinds & other.kinds
    return _Summary(kinds, values, properties, one.required | other.required)


def _any(summaries: list[_Summary]) -> _Summary:
    """What fits one of some schemas."""
    kinds = frozenset[str]().union(*(summary.kinds for summary in summaries))
    known = [summary.values for summary in summaries if summary.values is not None]
    values = frozenset[Hashable]().union(*known) if len(known) == len(summaries) else None
    names = set.intersection(*(set(summary.properties) for summary in summaries))
    properties = {name: _any([summary.properties[name] for summary in summaries]) for name in names}
    required = frozenset.intersection(*(summary.required for summary in summaries))
    return _Summary(kinds, values, properties, required)


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
