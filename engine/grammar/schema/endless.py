"""Whether a schema, as it is read, leaves a number open: one without an end to its digits."""

from __future__ import annotations

from typing import Any

from .keywords import BY_NAME, IN_PLACE, LISTS, SINGLE, VALUES, Schema, subschemas, types_of

_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_OF_MEMBERS = {"object": "additionalProperties", "array": "items"}


def may_be_endless(schema: Schema) -> bool:
    """Whether some number in a schema may be open; it may also say so of one that is not."""
    return any(_is_open(inner) for _, inner in subschemas(schema))


def _is_open(schema: Schema) -> bool:
    """The same without the schemas in it."""
    if any(key in schema for key in VALUES):
        return False
    if any(item is True for key in schema for item in _inner(key, schema[key])):
        return True
    types = types_of(schema)
    if not types:  # the schemas beside it say what it is, or nothing does
        return not any(key in schema for key in (*IN_PLACE, "$ref"))
    if any(kind in types and key not in schema for kind, key in _OF_MEMBERS.items()):
        return True
    if types.isdisjoint(("integer", "number")):
        return False
    has_ends = all(any(key in schema for key in keys) for keys in (_LOW, _HIGH))
    return not has_ends or ("number" in types and "multipleOf" not in schema)


def _inner(key: str, value: Any) -> list[Any]:
    """The schemas of a keyword."""
    if key in BY_NAME and isinstance(value, dict):
        return list(value.values())
    if key in LISTS and isinstance(value, list):
        return value
    return [value] if key in SINGLE else []
