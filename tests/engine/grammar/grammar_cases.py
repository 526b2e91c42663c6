"""Schemas and regular expressions to test grammars with. Only data."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

INTEGER: Schema = {"type": "integer", "minimum": -999, "maximum": 999}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def text(max_length: int = 6, **keywords: Any) -> Schema:
    """A short string."""
    return {"type": "string", "maxLength": max_length, **keywords}


def array(items: Schema, least: int = 0, most: int = 3, **keywords: Any) -> Schema:
    """A short array."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **keywords}


def record(
    required: dict[str, Any], optional: dict[str, Any] | None = None, **keywords: Any
) -> Any:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
        **keywords,
    }


def nested(depth: int) -> Schema:
    """Nested objects and arrays."""
    schema = INTEGER
    for level in range(depth):
        schema = record({"in": schema}) if level % 2 else array(schema, 1, 1)
    return schema


POINT = record({"x": INTEGER, "y": INTEGER})
NODE = record({"v": INTEGER, "next": {"anyOf": [NULL, {"$ref": "#/$defs/node"}]}})
_TREE = record({"name": text(3)}, {"children": array({"$ref": "#/$defs/tree"}, 0, 2)})

# Outputs of these are short, whatever the model chooses.
SCHEMAS: dict[str, Schema] = {
    "boolean": BOOLEAN,
    "null": NULL,
    "integer": {"type": "integer"},
    "integer in bounds": {"type": "integer", "minimum": -7, "maximum": 1203},
    "integer in exclusive bounds": {
        "type": "integer",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 11,
    },
    "integer, multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10_000},
    "number": {"type": "number"},
    "number in bounds": {"type": "number", "minimum": 0.5, "maximum": 2.25},
    "number in exclusive bounds": {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
    },
    "number, multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 100},
    "string of a length": text(8, minLength=3),
    "string of a length in code points": text(3, minLength=3, pattern="^[β-ω😀-😏日本]+$"),
    "string with a pattern": text(30, pattern="^[A-Z]{2}[0-9]{3,5}$"),
    "string with a pattern inside": text(8, pattern="[0-9]"),
    "string with a pattern of escapes": {"type": "string", "pattern": '^["\\\\/n]{1,4}$'},
    "string with a pattern or nothing": {"type": "string", "pattern": "^(|a+b?c{0,3})$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "duration": {"type": "string", "format": "duration"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "formats in an object": record(
        {"on": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "ipv4"}}
    ),
    "enum": {"enum": ["red", "green", "blue", "blueish"]},
    "enum of everything": {"enum": [1, "1", None, True, [1, {"a": 2}], {"k": []}, -0.5]},
    "enum of unicode": {"enum": ["é", "日本語", "😀👍🏽", 'a"b\\c\n\t', "Ω\u2028", ""]},
    "enum within a type": {"type": "string", "enum": ["a", 1, None, "ab"]},
    "const": {"const": "x y"},
    "const object": {"const": {"a": [1, 2.5, None], "ü": "😀"}},
    "type list": {"type": ["boolean", "null", "integer"], "minimum": 3, "maximum": 40},
    "object": record({"name": text(), "age": INTEGER}),
    "object in an object": record({"id": INTEGER, "at": record({"p": POINT, "ok": BOOLEAN})}),
    "object of optional properties": record({}, {"a": INTEGER, "b": BOOLEAN, "c": NULL}),
    "object of both": record({"b": BOOLEAN}, {"a": INTEGER, "c": text(2)}),
    "object with unicode names": record(
        {"é": INTEGER, "日本": BOOLEAN, 'q"\\\n': NULL, "😀": POINT}
    ),
    "object with an empty name": record({"": INTEGER, " ": NULL}),
    "object with required, unlisted names": {
        "type": "object",
        "required": ["a", "z"],
        "properties": {"a": BOOLEAN},
        "additionalProperties": BOOLEAN,
        "maxProperties": 2,
    },
    "map": {"type": "object", "patternProperties": {"^[a-c]{1,3}$": INTEGER}, "maxProperties": 3}
    | {"additionalProperties": False},
    "map with a least size": {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {"^k[0-9]$": BOOLEAN},
        "minProperties": 1,
        "maxProperties": 4,
    },
    "array": array(INTEGER),
    "array of a size": array(BOOLEAN, 4, 4),
    "array of arrays": array(array(array(BOOLEAN, 0, 2), 1, 2), 1, 2),
    "array of objects": array(record({"k": {"enum": ["a", "b"]}, "v": INTEGER}), 1, 3),
    "tuple": {"type": "array", "prefixItems": [INTEGER, BOOLEAN], "items": False, "minItems": 2},
    "tuple with a tail": {
        "type": "array",
        "prefixItems": [INTEGER, text(3)],
        "items": NULL,
        "minItems": 1,
        "maxItems": 4,
    },
    "anyOf": {"anyOf": [INTEGER, BOOLEAN, text(4)]},
    "anyOf objects": {"anyOf": [POINT, record({"x": BOOLEAN}), record({"z": NULL})]},
    "anyOf beside keywords": {
        "type": "object",
        "properties": {"a": INTEGER, "b": BOOLEAN},
        "additionalProperties": False,
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "oneOf by type": {"oneOf": [INTEGER, BOOLEAN, NULL, POINT]},
    "oneOf by tag": {
        "oneOf": [
            record({"kind": {"const": "point"}, "at": POINT}),
            record({"kind": {"const": "flag"}, "on": BOOLEAN}),
        ]
    },
    "allOf of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"properties": {"b": BOOLEAN}, "required": ["b"]},
            {"maxProperties": 2},
        ]
    },
    "allOf of bounds": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]},
    "reference": record({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}})
    | {"$defs": {"p": POINT}},
    "reference beside keywords": {
        "$ref": "#/definitions/i",
        "minimum": 5,
        "definitions": {"i": {"type": "integer", "maximum": 9}},
    },
    "reference to an escaped name": {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": POINT}},
    "reference to itself": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "reference to the root": record({}, {"in": {"$ref": "#"}, "ok": BOOLEAN}),
    "reference to each other": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": record({}, {"b": {"$ref": "#/$defs/b"}}),
            "b": array({"$ref": "#/$defs/a"}, 0, 1),
        },
    },
    "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    "deep": nested(24),
    "annotations": {
        **POINT,
        "title": "A point",
        "description": "somewhere",
        "$comment": "-",
        "examples": [{"x": 1, "y": 2}],
        "default": {"x": 0, "y": 0},
        "deprecated": False,
    },
}

# Outputs of these may be longer than max_new_tokens.
ENDLESS: dict[str, Schema] = {
    "any string": {"type": "string"},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "anything": {},
    "email": {"type": "string", "format": "email"},
    "uri": {"type": "string", "format": "uri"},
    "a long string": {"type": "string", "minLength": 5000},
}

# Python's `regex` and Rust's give them the same meaning.
REGEXES: list[str] = [
    r"[0-9]{3}",
    r"\d{3}-\d{4}",
    r"1(\.5)?",
    r"(\+?1-)?[2-9][0-9]{2}(-[0-9]{4})?",
    r"yes|no|maybe",
    r"(yes|no|yesterday)",
    r"(a|ab)(c|bcd)(d*)",
    r"a?b?c?d?e?",
    r"(foo|bar){2,3}",
    r"(ab){0,5}c",
    r"x{2}y{3,}z",
    r"[a-f0-9]{8}-[a-f0-9]{4}",
    r"[^a-z0-9\s]{2,5}",
    r"[A-Za-z_][A-Za-z_0-9]{0,9}",
    r"(?i)hello wor?ld",
    r"(?i:abc)DEF",
    r"[β-ω]{1,5}",
    r"[日本語]{2,4}",
    r"[😀-😏]{1,3}",
    r"é|è|ê|e\u0301",
    r"(Straße|Zürich|København)",
    r"\p{Lu}\p{Ll}{1,4}",
    r"\p{Greek}{2}",
    r"\p{Cyrillic}{2}",
    r"\.\*\+\?\(\)\[\]\{\}\|\\\^\$",
    r"\x41\u00e9\U0001F600",
    r"\t\n\r",
    r"line one\nline two\n?",
    r"\w{1,6}",
    r"\w{1,8}@\w{1,8}\.(com|org)",
    r"\S{1,4}\s\S{1,4}",
    r".{1,5}",
    r"(?s:.{3})",
    r"(?s).{0,4}end",
    r"[\[\]\-\\^]{1,6}",
    r"([0-9]{1,3}\.){3}[0-9]{1,3}",
    r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"#([0-9a-fA-F]{3}){1,2}",
    r"-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,4})?([eE][+-]?[0-9]{1,2})?",
    r"(?:(?:a|b)*c){1,3}",
    r"((((((deep))))))?!",
    r"(?P<year>\d{4})",
    r"\{\"answer\": (true|false)\}",
    r"  two spaces  ",
    r"<\|end\|>",
    r"(<\|user\|>|plain)",
    r"",
    r"(|a)",
    r"[ab]*?c",
    r"(a|b|(c|d(e|f)){2}){3}",
]
