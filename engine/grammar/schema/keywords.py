"""The keywords of JSON Schema 2020-12: where schemas stand in a schema, and what says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...protocol.errors import GrammarError

Schema = dict[str, Any]


class UnsaidError(GrammarError):
    """A schema has a keyword that the libraries' keywords cannot say."""


class Unlisted(dict[str, Any]):
    """Properties of which a keyword speaks that does not list them: they close no object."""


BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_PLACE = ("allOf", "anyOf", "oneOf")  # their schemas speak of the same value
LISTS = (*IN_PLACE, "prefixItems")
SINGLE = frozenset(
    (
        "items",
        "additionalItems",
        "additionalProperties",
        "propertyNames",
        "contains",
        "not",
        "if",
        "then",
        "else",
        "unevaluatedItems",
        "unevaluatedProperties",
    )
)
OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")
OF_ARRAYS = ("items", "prefixItems")
SIZES = tuple(
    f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties")
)
VALUES = ("const", "enum")  # what they hold are values, and no schemas
ANNOTATIONS = frozenset(
    (
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "discriminator",
        "readOnly",
        "writeOnly",
        "contentMediaType",
        "contentEncoding",
        "contentSchema",
        "$comment",
        "$schema",
        "$vocabulary",
        "$id",
        "id",
        "$anchor",
        "x-guidance",
    )
)
# No library here enforces these, in any place.
UNENFORCEABLE = frozenset(
    (
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
    )
)


def subschemas(schema: Any, place: str = "#") -> Iterator[tuple[str, Schema]]:
    """All schemas in a schema, itself too, with the place of each as a JSON pointer."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key, value in schema.items():
        inner = f"{place}/{escaped(key)}"
        if key in BY_NAME and isinstance(value, dict):
            for name, item in value.items():
                yield from subschemas(item, f"{inner}/{escaped(name)}")
        elif key in (*LISTS, "items") and isinstance(value, list):
            for index, item in enumerate(value):
                yield from subschemas(item, f"{inner}/{index}")
        elif key in SINGLE:
            yield from subschemas(value, inner)


def types_of(schema: Schema) -> set[str]:
    """The types that `type` names; none if it is absent."""
    types = schema.get("type")
    return {types} if isinstance(types, str) else set(strings(types))


def strings(value: Any) -> list[str]:
    """The strings of a list; none if it is no list."""
    return [item for item in items(value) if isinstance(item, str)]


def items(value: Any) -> list[Any]:
    """A list, or an empty one if it is none."""
    return value if isinstance(value, list) else []


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
