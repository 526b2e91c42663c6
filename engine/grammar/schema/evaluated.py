"""`unevaluatedProperties` and `unevaluatedItems`: what holds for those that nothing else names."""

from __future__ import annotations

from typing import Any

from .keywords import Schema, items

# Whether these speak of a property or an item is known only of a whole value.
_CONDITIONAL = ("anyOf", "oneOf", "if", "dependentSchemas", "dependencies", "$dynamicRef")


def without_unevaluated(schema: Schema, speakers: list[Schema]) -> Schema:
    """An equal schema that lists what is evaluated; the same one if that cannot be known.

    Args:
        schema: may have the keywords.
        speakers: all schemas that speak of the same value, the first of which is `schema`.
    """
    if any(key in speaker for speaker in speakers for key in _CONDITIONAL):
        return schema
    if "unevaluatedProperties" in schema:
        schema = _with_listed_properties(schema, speakers)
    if "unevaluatedItems" in schema and not any("contains" in speaker for speaker in speakers):
        schema = _with_listed_items(schema, speakers)
    return schema


def _with_listed_properties(schema: Schema, speakers: list[Schema]) -> Schema:
    value, kept = schema["unevaluatedProperties"], _without(schema, "unevaluatedProperties")
    if _are_all_evaluated(speakers, "additionalProperties", "unevaluatedProperties"):
        return kept
    for key in ("properties", "patternProperties"):
        own = kept.get(key, {})
        names = [name for speaker in speakers for name in _names(speaker.get(key))]
        if names:
            kept[key] = {**own, **{name: True for name in names if name not in own}}
    return {**kept, "additionalProperties": value}


def _with_listed_items(schema: Schema, speakers: list[Schema]) -> Schema:
    value, kept = schema["unevaluatedItems"], _without(schema, "unevaluatedItems")
    if _are_all_evaluated(speakers, "items", "unevaluatedItems"):
        return kept
    own = items(kept.get("prefixItems"))
    length = max(len(items(speaker.get("prefixItems"))) for speaker in speakers)
    if length:
        kept["prefixItems"] = [*own, *[True] * (length - len(own))]
    return {**kept, "items": value}


def _are_all_evaluated(speakers: list[Schema], key: str, unevaluated: str) -> bool:
    """Whether one of the schemas speaks of all further properties or items."""
    if any(key in speaker for speaker in speakers):
        return True
    return any(speaker.get(unevaluated, False) is not False for speaker in speakers[1:])


def _names(given: Any) -> list[str]:
    return list(given) if isinstance(given, dict) else []


def _without(schema: Schema, key: str) -> Schema:
    return {name: value for name, value in schema.items() if name != key}
