"""Keywords that others can say: `propertyNames`, `not`, `dependentRequired` and their like.

What cannot be said otherwise stays as it is, and is refused by the one who reads on.
"""

from __future__ import annotations

import re
from typing import Any

from .keywords import Schema, Unlisted, items, strings, types_of

_ALL_TYPES = ("null", "boolean", "number", "string", "array", "object")
_OPPOSITE = {"minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum"}
_OPPOSITE |= {"exclusiveMaximum": "minimum", "exclusiveMinimum": "maximum"}
_MAX_EXCLUSIVE = 8  # schemas of a `oneOf` that may overlap
_NOTHING: dict[str, tuple[Any, ...]] = {  # keywords with values that say nothing
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}


def without_applicators(schema: Schema) -> Schema | bool:
    """An equal schema with fewer keywords."""
    kept = {key: value for key, value in schema.items() if not _says_nothing(key, value)}
    if "contains" not in kept:
        kept = {key: kept[key] for key in kept if key not in ("minContains", "maxContains")}
    kept = _without_conditions(kept)
    kept = with_prefix_items(kept)
    kept = _with_named_properties(kept)
    kept = _with_dependents(kept)
    return _without_not(kept) if "not" in kept else kept


def other_than(texts: list[str]) -> str:
    """A regular expression for all texts but these."""
    return f"^{_other_than(sorted(set(texts)))}$"


def _other_than(texts: list[str]) -> str:
    """The same without anchors: longer texts, parts, and texts that differ in a character."""
    if not texts:
        return "(?s:.*)"
    follows: dict[str, list[str]] = {}
    for text in texts:
        if text:
            follows.setdefault(text[0], []).append(text[1:])
    forms = [f"{re.escape(first)}{_other_than(rest)}" for first, rest in follows.items()]
    if follows:
        forms.append(f"[^{''.join(map(re.escape, follows))}](?s:.*)")
    else:
        forms.append("(?s:.+)")
    return f"(?:{'|'.join(forms)}){'' if '' in texts else '?'}"


def _says_nothing(key: str, value: Any) -> bool:
    same = [other for other in _NOTHING.get(key, ()) if type(other) is type(value)]
    return value in same


def _without_conditions(schema: Schema) -> Schema:
    """A condition whose outcome is known, or that has none."""
    if "if" not in schema or not ("then" in schema or "else" in schema):
        return {key: schema[key] for key in schema if key not in ("if", "then", "else")}
    condition, kept = schema["if"], _without(_without(_without(schema, "if"), "then"), "else")
    if isinstance(condition, bool):
        return _also(kept, schema.get("then" if condition else "else", True))
    failures = _failures(condition)
    if failures is None:
        return schema
    holds = {"allOf": [_unlisted(condition), schema.get("then", True)]}
    fails = {"allOf": [{"anyOf": failures}, schema.get("else", True)]}
    return _also(kept, {"anyOf": [holds, fails]})


def exactly_one(schemas: list[Any]) -> Schema | None:
    """A schema for what fits one of some and no other; None if that cannot be said."""
    failures = [_failures(schema) for schema in schemas]
    if len(schemas) > _MAX_EXCLUSIVE or any(some is None for some in failures):
        return None
    choices = []
    for index, schema in enumerate(schemas):
        others = [{"anyOf": some} for at, some in enumerate(failures) if at != index]
        choices.append({"allOf": [schema, *others]})
    return {"anyOf": choices}


def _unlisted(schema: Schema) -> Schema:
    """A schema whose properties close no object."""
    given = schema.get("properties")
    return {**schema, "properties": Unlisted(given)} if isinstance(given, dict) else schema


def _failures(schema: Any) -> list[Any] | None:
    """Schemas of which one fits what does not fit a schema; None if they cannot be said."""
    if isinstance(schema, bool):
        return [] if schema else [True]
    if not isinstance(schema, dict):
        return None
    if len(schema) == 1 and not schema.keys().isdisjoint(_OPPOSITE):
        ((key, bound),) = schema.items()
        return [{"type": "number", _OPPOSITE[key]: bound}]
    if schema.keys() <= {"type", "const", "enum"} and len(schema) == 1:
        opposite = _without_not({"not": schema})
        if isinstance(opposite, dict) and "not" in opposite:
            return None
        return [opposite]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not schema.keys() <= {"properties", "required", "type"} or not isinstance(properties, dict):
        return None
    kind = {"type": "object"}
    failures: list[Any] = [{"not": kind}] if schema.get("type") == "object" else []
    if schema.get("type", "object") != "object" or strings(required) != required:
        return None
    failures += [{**kind, "properties": Unlisted({name: False})} for name in required]
    for name, value in properties.items():
        inside = _failures(value)
        if inside is None:
            return None
        wrong = Unlisted({name: {"anyOf": inside}})
        failures.append({**kind, "properties": wrong, "required": [name]})
    return failures


def with_prefix_items(schema: Schema) -> Schema:
    """A list of `items`, as older drafts have it, as `prefixItems`."""
    kept = dict(schema)
    more = kept.pop("additionalItems", None)
    if isinstance(kept.get("items"), list):
        kept["prefixItems"] = kept.pop("items")
        if more is not None:
            kept["items"] = more
    return kept


def _with_named_properties(schema: Schema) -> Schema:
    """`propertyNames` as the properties or patterns that there may be."""
    names = schema.get("propertyNames")
    if names is False:
        return {**_without(schema, "propertyNames"), "maxProperties": 0}
    spoken_of = ("properties", "patternProperties", "unevaluatedProperties")
    if not isinstance(names, dict) or any(key in schema for key in spoken_of):
        return schema
    value = schema.get("additionalProperties", True)
    closed = {**_without(schema, "propertyNames"), "additionalProperties": False}
    names = _without(names, "type") if names.get("type") == "string" else names
    listed = names.get("enum", [names.get("const")])
    if names.keys() <= {"enum", "const"} and len(names) == 1 and isinstance(listed, list):
        return {**closed, "properties": dict.fromkeys(strings(listed), value)}
    if names.keys() == {"pattern"}:
        return {**closed, "patternProperties": {names["pattern"]: value}}
    if names.keys() <= {"minLength", "maxLength"} and all(type(n) is int for n in names.values()):
        length = f"{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}"
        return {**closed, "patternProperties": {rf"^[\s\S]{length}$": value}}
    return schema


def _with_dependents(schema: Schema) -> Schema:
    """Keywords that hold if there is a property: there is none, or they hold."""
    kept = dict(schema)
    older = kept.pop("dependencies", None)
    for given in (kept.pop("dependentRequired", None), kept.pop("dependentSchemas", None), older):
        for name, then in given.items() if isinstance(given, dict) else ():
            also = {"required": strings(then)} if isinstance(then, list) else then
            first = {"properties": Unlisted({name: True}), "required": [name]}
            absent = {"properties": Unlisted({name: False})}
            kept = _also(kept, {"anyOf": [absent, {"allOf": [first, also]}]})
    return kept


def _without_not(schema: Schema) -> Schema | bool:
    given, kept = schema["not"], _without(schema, "not")
    if given is True or given == {}:
        return False
    if not isinstance(given, dict):
        return schema
    if given.keys() == {"type"}:
        return _of_other_types(schema, types_of(given))
    if given.keys() == {"required"} and len(strings(given["required"])) == 1:
        absent = dict.fromkeys(given["required"], False)
        return _also(kept, {"type": "object", "properties": Unlisted(absent)})
    values = given.get("enum", [given.get("const")])
    if given.keys() <= {"enum", "const"} and len(given) == 1 and strings(values) == values:
        return _also(kept, {"pattern": other_than(values)})
    failures = _failures(given) if given.keys() <= {"properties", "required", *_OPPOSITE} else None
    return schema if failures is None else _also(kept, {"anyOf": failures})


def _of_other_types(schema: Schema, types: set[str]) -> Schema | bool:
    allowed = types_of(schema) or set(_ALL_TYPES)
    if "integer" in types and "number" in allowed - types:
        return schema  # numbers that are no integers cannot be said
    if "number" in types:
        types = types | {"integer"}
    left = sorted(allowed - types)
    return {**_without(schema, "not"), "type": left} if left else False


def _also(schema: Schema, other: Any) -> Schema:
    if other is True:
        return schema
    return {**schema, "allOf": [*items(schema.get("allOf")), other]}


def _without(schema: Schema, key: str) -> Schema:
    return {name: value for name, value in schema.items() if name != key}
