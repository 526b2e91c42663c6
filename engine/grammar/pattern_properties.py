"""Names that `properties` lists and a pattern of `patternProperties` allows too.

The library makes a terminal of the names that a pattern allows and nothing else lists, and fails
where such a name could follow but there is none: long after it accepted the schema. Here a pattern
without other names goes, and its schema joins those of the names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from llguidance import LLMatcher

from .byte_tokenizer import byte_tokenizer
from .schema.keywords import Schema, strings, subschemas


def without_taken_patterns(schema: Schema) -> None:
    """Changes all objects in a schema so that each of their patterns allows a name of its own."""
    parts = [inner for _, inner in subschemas(schema)]
    # Those of the whole schema: the library joins objects of which several parts speak.
    names = dict.fromkeys(name for part in parts for name in _spoken_of(part))
    for part in parts:
        patterns = part.get("patternProperties")
        if isinstance(patterns, dict) and patterns:
            _merge(part, patterns, list(names))


def overlap(schema: Schema, *, of_one_object: bool = False) -> bool:
    """Whether a name may match two of the patterns in a schema, which the library refuses."""
    given = [inner.get("patternProperties") for _, inner in subschemas(schema)]
    objects = [list(some) for some in given if isinstance(some, dict)]
    every = list(dict.fromkeys(pattern for patterns in objects for pattern in patterns))
    return any(map(_share_names, objects if of_one_object else [every]))


def _share_names(patterns: list[str]) -> bool:
    if len(patterns) < 2:
        return False
    matcher = _matcher({"type": "object", "patternProperties": dict.fromkeys(patterns, True)})
    return matcher.is_error() and "disjoint" in matcher.get_error()


def _spoken_of(schema: Schema) -> list[str]:
    properties = schema.get("properties")
    listed = list(properties) if isinstance(properties, dict) else []
    return [*listed, *strings(schema.get("required"))]


def _merge(schema: Schema, patterns: Schema, names: list[str]) -> None:
    properties = schema.get("properties")
    listed: Schema = dict(properties) if isinstance(properties, dict) else {}
    own = _spoken_of(schema)
    kept = {}
    for pattern, value in patterns.items():
        if _has_names(names, pattern):
            kept[pattern] = value
            continue
        for name in filter(partial(_matches, pattern), names):
            listed[name] = {"allOf": [listed.get(name, True), value]}
    if kept == patterns and not _cover_all(own, kept):
        return
    schema.update(properties=listed, patternProperties=kept)
    if kept and _cover_all(own, kept):
        schema["additionalProperties"] = False


def _has_names(listed: Iterable[str], pattern: str) -> bool:
    """Whether a pattern allows a name that is not listed."""
    return _may_have_a_property(
        {
            "properties": dict.fromkeys(listed, False),
            "patternProperties": {pattern: True},
            "additionalProperties": False,
        }
    )


def _cover_all(listed: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether no name is left that is not listed and that no pattern allows."""
    return not _may_have_a_property(
        {
            "properties": dict.fromkeys(listed, False),
            "patternProperties": dict.fromkeys(patterns, False),
        }
    )


def _matches(pattern: str, name: str) -> bool:
    schema = {"type": "string", "allOf": [{"const": name}, {"pattern": pattern}]}
    return not _matcher(schema).is_error()


def _may_have_a_property(schema: Schema) -> bool:
    """Whether an object may have one. So may one of an invalid schema, which others refuse."""
    matcher = _matcher({"type": "object", **schema})
    if matcher.is_error():
        return True
    return bool(matcher.consume_tokens(byte_tokenizer().tokenize_str('{"')))


def _matcher(schema: Schema) -> LLMatcher:
    options: Any = {
        "json_allowed_escapes": 'nrbtf\\"'
    }  # by number, every name could be written anew
    source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    return LLMatcher(byte_tokenizer(), source, log_level=0)
