"""Schemas with instances that they allow or not, and schemas that are refused. Only data."""

from __future__ import annotations

from typing import Any

from tests.engine.grammar.grammar_cases import (
    BOOLEAN,
    INTEGER,
    NODE,
    NULL,
    POINT,
    Schema,
    array,
    record,
    text,
)

# A schema with a keyword that cannot be enforced, and a part of the error's text.
REFUSED: dict[str, tuple[Schema, str]] = {
    "not": ({"type": "string", "not": {"format": "date"}}, '"not"'),
    "not a multiple": ({"type": "integer", "not": {"multipleOf": 3}}, '"multipleOf"'),
    "uniqueItems": (array(INTEGER, uniqueItems=True), '"uniqueItems"'),
    "uniqueItems of many values": (
        array({"enum": list(range(20))}, uniqueItems=True),
        "more than 600 states",
    ),
    "contains": ({"contains": {"format": "date"}, "maxContains": 1}, '"contains"'),
    "contains of many items": ({"contains": {"const": 1}, "minContains": 5000}, "states"),
    "if": ({"if": {"format": "date"}, "then": {"minLength": 1}}, '"if"'),
    "then": ({"if": {"uniqueItems": True}, "then": {"minItems": 1}}, '"then"'),
    "else": ({"if": {"pattern": "(?=a)"}, "else": {"minLength": 1}}, '"else"'),
    "too many choices": (
        {"allOf": [{"anyOf": [{"required": [f"{n}"]}, {"minProperties": 1}]} for n in range(20)]}
        | {"unevaluatedProperties": False},
        "more than 256 forms",
    ),
    "unevaluatedProperties": ({"not": {"unevaluatedProperties": False}}, '"unevaluatedProperties"'),
    "unevaluatedItems": ({"not": {"unevaluatedItems": NULL}}, '"unevaluatedItems"'),
    "propertyNames": (
        {"propertyNames": {"format": "date"}, "properties": {"a": BOOLEAN}},
        '"propertyNames"',
    ),
    "$dynamicRef": ({"$dynamicRef": "#x"}, "#x"),
    "overlapping oneOf": (
        {"oneOf": [{"type": "string", "format": "date"}, {"type": "string", "maxLength": 20}]},
        '"oneOf"',
    ),
    "minProperties": (
        {"type": "object", "additionalProperties": INTEGER, "minProperties": 2},
        '"minProperties"',
    ),
    "unknown type": ({"type": "text"}, "type: text"),
    "lookahead": ({"type": "string", "pattern": "^(?=a)[a-z]+$"}, "look-ahead"),
    "lookbehind": ({"type": "string", "pattern": "a(?<!b)c"}, "look-behind"),
    "backreference": ({"type": "string", "pattern": r"^(a|b)\1$"}, "backreferences"),
    "remote reference": ({"$ref": "https://example.com/a.json"}, "https://example.com/a.json"),
    "reference to nothing": ({"$ref": "#/$defs/nothing"}, "/$defs/nothing"),
    "minLength above maxLength": (text(2, minLength=5), "minLength"),
    "minimum above maximum": ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
    "an empty enum": ({"enum": []}, "empty"),
}

# A schema, instances that it allows (properties in its order), and instances that it does not.
INSTANCES: dict[str, tuple[Schema, list[Any], list[Any]]] = {
    "anything": ({}, [0, -1.5, "é😀", None, True, [], {}, [1, {"a": [None]}]], []),
    "string": (
        {"type": "string"},
        ["", "a", '\n\t"\\/', "日本 😀", "\u2028"],
        [0, None, [], {}],
    ),
    "integer": ({"type": "integer"}, [0, -1, 7, 10**15], [1.5, "1", True, None, [1]]),
    "number": ({"type": "number"}, [0, 1, -1, 1.5, -0.25, 1e30, 1.5e-7], ["1", None, False]),
    "boolean": ({"type": "boolean"}, [True, False], [0, 1, "true", None]),
    "null": ({"type": "null"}, [None], [0, "", False, [], "null"]),
    "several types": ({"type": ["string", "null"]}, ["a", None], [1, True, [], {}]),
    "minimum": ({"type": "integer", "minimum": -3}, [-3, 0, 12345], [-4, -100]),
    "maximum": ({"type": "integer", "maximum": 12}, [12, 0, -13, -12345], [13, 20, 120]),
    "minimum of numbers": ({"type": "number", "minimum": 0.5}, [0.5, 0.51, 3, 3.25], [0.49, 0, -1]),
    "maximum of numbers": ({"type": "number", "maximum": 1.5}, [1.5, 1.49, -8.5], [1.51, 2, 15]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 0}, [1, 10], [0, -1]),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 10}, [9, -10], [10, 11, 100]),
    "exclusive bounds of numbers": (
        {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
        [1.5, 1.001, 1.999],
        [1, 2, 0.9, 2.1],
    ),
    "a bound without a type": ({"minimum": 5}, [5, 6, "a", None, []], [4, -5]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, [0, 7, 21, 700], [1, 8, 20]),
    "integers among the multiples of a fraction": (
        {"type": "integer", "multipleOf": 1.5, "minimum": 1},
        [3, 6, 30],
        [1, 2, 4, 1.5],
    ),
    "multipleOf a fraction": (
        {"type": "number", "multipleOf": 0.25},
        [0, 0.25, 1.75, 3],
        [0.1, 0.3],
    ),
    "minLength": ({"type": "string", "minLength": 2}, ["ab", "é😀", "\n\n"], ["", "a", "😀", "\n"]),
    "maxLength": ({"type": "string", "maxLength": 2}, ["", "ab", "é😀", "\n\\"], ["abc", "😀😀😀"]),
    "pattern": ({"type": "string", "pattern": "^a+$"}, ["a", "aaa"], ["", "b", "ab", "A"]),
    "pattern inside": ({"type": "string", "pattern": "b[0-9]"}, ["b1", "ab1c"], ["", "b", "1b"]),
    "pattern at the beginning": ({"type": "string", "pattern": "^b"}, ["b", "ba"], ["ab", ""]),
    "pattern at the end": ({"type": "string", "pattern": "b$"}, ["b", "ab"], ["ba", ""]),
    "pattern of unicode": (
        {"type": "string", "pattern": "^[β-ω😀]+$"},
        ["ωψ", "😀"],
        ["d", "日", ""],
    ),
    "pattern and maxLength": (
        {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3},
        ["a", "abc"],
        ["", "abcd", "1"],
    ),
    "format date": (
        {"type": "string", "format": "date"},
        ["2024-02-29", "1999-12-31"],
        ["2024-13-01", "2024-1-1", "2023-02-30", "1.1.2024", ""],
    ),
    "format time": (
        {"type": "string", "format": "time"},
        ["10:20:30Z", "23:59:59.123+02:00"],
        ["25:00:00Z", "10:60:00Z", "10:20", ""],
    ),
    "format date-time": (
        {"type": "string", "format": "date-time"},
        ["2024-02-28T10:20:30Z", "2024-02-28T10:20:30.5-08:00"],
        ["2024-02-28", "2024-02-28 10:20", "2024-02-30T10:20:30Z"],
    ),
    "format uuid": (
        {"type": "string", "format": "uuid"},
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "123g4567-e89b-12d3-a456-426614174000", "x"],
    ),
    "format ipv4": ({"type": "string", "format": "ipv4"}, ["1.2.3.4"], ["256.1.1.1", "1.2.3"]),
    "format ipv6": ({"type": "string", "format": "ipv6"}, ["::1", "2001:db8::1"], ["x:y", "1.2.3"]),
    "format email": ({"type": "string", "format": "email"}, ["a.b@example.com"], ["ab", "a b@c.d"]),
    "format that nobody knows": (
        {"type": "string", "format": "colour"},
        ["", "red"],
        [1, None],
    ),
    "format of a number": ({"type": "integer", "format": "int64"}, [1, -5], ["1"]),
    "pattern of pydantic's Decimal": (
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
        ["0", "-1.5", ".5", "5.", "+00.1"],
        ["", ".", "-", "+.", "1e5", "a"],
    ),
    "pattern of pydantic's Decimal of some digits": (
        {
            "type": "string",
            "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
        },
        ["123", "-1.5", "123.45", "001.2300"],
        ["", ".", "1234", "1.234", "123.456"],
    ),
    "enum within bounds": ({"enum": [1, 5, "a"], "maximum": 3}, [1, "a"], [5]),
    "enum": ({"enum": ["a", 1, None, {"k": [1]}]}, ["a", 1, None, {"k": [1]}], ["b", 2, True, {}]),
    "enum within a type": ({"type": "string", "enum": ["a", 1]}, ["a"], [1, "b"]),
    "enum within a length": ({"enum": ["a", "abc"], "maxLength": 2}, ["a"], ["abc"]),
    "const": ({"const": [1, "x"]}, [[1, "x"]], [[1], ["x", 1], [1, "x", 1], 1]),
    "required": (
        record({"a": INTEGER, "b": BOOLEAN}),
        [{"a": 1, "b": True}],
        [{}, {"a": 1}, {"b": True}, {"a": "1", "b": True}, {"a": 1, "b": True, "c": 1}],
    ),
    "optional": (
        record({"b": INTEGER}, {"c": INTEGER, "d": INTEGER}),
        [{"b": 1}, {"b": 1, "c": 2}, {"b": 1, "d": 2}, {"b": 1, "c": 2, "d": 3}],
        [{}, {"c": 2}, {"b": 1, "c": None}],
    ),
    "required but not listed": (
        {"type": "object", "properties": {"a": INTEGER}, "required": ["z"]},
        [{"z": 1}, {"a": 1, "z": "?"}],
        [{}, {"a": 1}, {"z": 1, "b": 1}],
    ),
    "properties alone": (
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
        [{"a": 1}],
        [{}, {"b": 1}, {"a": "x"}, {"a": 1, "b": [2]}],
    ),
    "additional properties": (
        {"properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": True},
        [{"a": 1}, {"a": 1, "b": [2]}],
        [{}, {"b": 1}, {"a": "x"}],
    ),
    "additional properties of a kind": (
        {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": BOOLEAN},
        [{}, {"a": 1}, {"a": 1, "b": True}, {"c": False}],
        [{"b": 1}, {"a": True}],
    ),
    "properties without a type": (
        {"properties": {"a": INTEGER}, "required": ["a"]},
        [{"a": 1}, 3, "a", None, []],
        [{}, {"a": "x"}],
    ),
    "a property that is never allowed": (
        {"type": "object", "properties": {"a": False, "b": True}},
        [{}, {"b": 1}],
        [{"a": 1}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x": INTEGER}, "additionalProperties": False},
        [{}, {"x": 1}, {"x1": 1, "xy": 2}],
        [{"y": 1}, {"x": "1"}],
    ),
    "patternProperties beside the same name": (
        record(
            {"a": INTEGER, "b": {}}, patternProperties={"^[ab]$": BOOLEAN | {"type": "integer"}}
        ),
        [{"a": 1, "b": 2}],
        [{"a": 1, "b": True}, {"a": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "patternProperties of names that another part requires": (
        {
            "type": "object",
            "patternProperties": {"^(?:c)$": BOOLEAN},
            "additionalProperties": False,
            "anyOf": [{"required": ["c"]}, {"not": {"required": ["c"]}}],
        },
        [{}, {"c": True}],
        [{"c": 1}, {"a": True}, {"c": True, "a": 1}],
    ),
    "patternProperties for every name": (
        {"type": "object", "patternProperties": {"": INTEGER}},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
        [{"a": "x"}, {"a": 1, "b": None}],
    ),
    "propertyNames of any kind": (
        {"propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
        [{}, {"a": 1}, [], None],
        [{"a": "x"}],
    ),
    "propertyNames of a list": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INTEGER},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
        [{"c": 1}, {"a": "x"}],
    ),
    "propertyNames of a pattern": (
        {"type": "object", "propertyNames": {"type": "string", "pattern": "^x"}},
        [{}, {"x": 1}, {"xa": "", "xb": []}],
        [{"a": 1}, {"xa": 1, "b": 2}],
    ),
    "propertyNames of a length": (
        {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
        [{}, {"ab": 1}, {"é日😀": 1}],
        [{"a": 1}, {"abcd": 2}],
    ),
    "dependentRequired": (
        record({}, {"a": INTEGER, "b": INTEGER}, dependentRequired={"a": ["b"]}),
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    "dependentSchemas": (
        {"dependentSchemas": {"a": {"properties": {"b": INTEGER}}}, "additionalProperties": True},
        [{}, {"b": "x"}, {"a": 1, "b": 1}, 5],
        [{"a": 1, "b": "x"}],
    ),
    "dependencies": (
        record({}, {"a": NULL, "b": NULL}, dependencies={"a": ["b"], "b": {"required": ["a"]}}),
        [{}, {"a": None, "b": None}],
        [{"a": None}, {"b": None}],
    ),
    "not a constant": (
        {"type": ["string", "null"], "not": {"enum": ["ab", "b", ""]}},
        ["a", "abc", "bb", "c", "\n", None],
        ["ab", "b", ""],
    ),
    "not of a type": ({"not": {"type": ["number", "object"]}}, ["a", None, [1]], [1, 1.5, {}]),
    "not required": ({"not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}, 5]),
    "a condition on a tag": (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}, "x": INTEGER, "y": BOOLEAN},
            "required": ["kind"],
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["x"]},
            "else": {"properties": {"x": False}, "required": ["y"]},
        },
        [{"kind": "a", "x": 1}, {"kind": "a", "x": 1, "y": True}, {"kind": "b", "y": True}],
        [{"kind": "a"}, {"kind": "b"}, {"kind": "b", "x": 1, "y": True}, {"x": 1, "y": True}],
    ),
    "a condition on a number": (
        {"if": {"minimum": 10}, "then": {"multipleOf": 5}, "else": {"type": "integer"}},
        [10, 15, 7, -3],
        [11, 7.5],
    ),
    "a condition on what is there": (
        record({}, {"a": NULL, "b": NULL, "c": NULL})
        | {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
        [{"a": None, "b": None}, {"c": None}, {"b": None, "c": None}],
        [{}, {"a": None}, {"a": None, "c": None}, {"b": None}],
    ),
    "not these properties": (
        record({}, {"a": NULL, "b": text(2)})
        | {"not": {"properties": {"b": {"const": "x"}}, "required": ["a"]}},
        [{}, {"b": "x"}, {"a": None, "b": "y"}],
        [{"a": None}, {"a": None, "b": "x"}],
    ),
    "unevaluatedProperties": (
        {
            "$ref": "#/$defs/a",
            "properties": {"b": BOOLEAN},
            "unevaluatedProperties": NULL,
            "$defs": {"a": {"properties": {"a": INTEGER}}},
        },
        [{}, {"a": 1, "b": True}, {"a": 1, "c": None}, 5],
        [{"a": True}, {"b": 1}, {"a": 1, "c": 1}],
    ),
    "unevaluatedProperties of a part": (
        {
            "type": "object",
            "allOf": [
                {"properties": {"a": INTEGER, "b": INTEGER}},
                {"properties": {"a": {"minimum": 5}}, "unevaluatedProperties": False},
            ],
        },
        [{}, {"a": 5}],
        [{"a": 4}, {"a": 5, "b": 1}, {"c": 1}],
    ),
    "unevaluatedItems": (
        {
            "type": "array",
            "allOf": [{"prefixItems": [INTEGER, BOOLEAN]}],
            "prefixItems": [{"minimum": 5}],
            "unevaluatedItems": NULL,
        },
        [[], [5], [7, True], [7, True, None]],
        [[4], [7, 1], [7, True, 1]],
    ),
    "oneOf that overlap": ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, [2, 6], [3, 4, 5, "a"]),
    "oneOf of required names": (
        record({}, {"a": INTEGER, "b": INTEGER, "c": INTEGER})
        | {"oneOf": [{"required": ["a"]}, {"required": ["b", "c"]}]},
        [{"a": 1}, {"a": 1, "c": 2}, {"b": 1, "c": 2}],
        [{}, {"b": 1}, {"a": 1, "b": 2, "c": 3}],
    ),
    "a condition that always holds": ({"if": True, "then": INTEGER, "else": NULL}, [1], [None]),
    "minContains alone": ({"type": "array", "minContains": 2}, [[], [1]], [None]),
    "minProperties": (
        {"type": "object", "additionalProperties": INTEGER, "minProperties": 1},
        [{"a": 1}, {"a": 1, "b": 2, "c": 3}],
        [{}, {"a": "x"}],
    ),
    "maxProperties": (
        {"type": "object", "additionalProperties": INTEGER, "maxProperties": 1},
        [{}, {"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    "items": (array(INTEGER, 0, 9), [[], [1], [1, 2, 3]], [["a"], [1, None], {}, 1]),
    "minItems": ({"type": "array", "minItems": 2}, [[1, "a"], [1, 2, 3]], [[], [1]]),
    "maxItems": ({"type": "array", "maxItems": 2}, [[], [1], [1, "a"]], [[1, 2, 3]]),
    "prefixItems": (
        {"type": "array", "prefixItems": [INTEGER, BOOLEAN]},
        [[], [1], [1, True], [1, True, "x"]],
        [[True], [1, 2]],
    ),
    "prefixItems only": (
        {"type": "array", "prefixItems": [INTEGER], "items": False},
        [[], [1]],
        [["a"], [1, 2]],
    ),
    "items of an older draft": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [INTEGER, BOOLEAN],
            "additionalItems": False,
        },
        [[], [1], [1, True]],
        [[True], [1, 2], [1, True, 3]],
    ),
    "anyOf": ({"anyOf": [INTEGER, text(2)]}, [1, "ab"], ["abc", None, 1.5, 1000]),
    "anyOf beside a type": (
        {"type": "string", "anyOf": [{"maxLength": 1}, {"const": "abc"}]},
        ["", "a", "abc"],
        ["ab", 1, None],
    ),
    "oneOf": ({"oneOf": [INTEGER, NULL]}, [1, None], ["a", True, 1.5]),
    "oneOf by tag, by reference": (
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "discriminator": {"propertyName": "t"},
            "$defs": {
                t: {
                    "type": "object",
                    "properties": {"t": {"const": t}, t: INTEGER},
                    "required": ["t"],
                }
                for t in ("a", "b")
            },
        },
        [{"t": "a", "a": 1}, {"t": "b"}],
        [{"t": "a", "b": 1}, {"a": 1}, {"t": "c"}, {"t": "a", "x": 1}],
    ),
    "oneOf by tag": (
        {"oneOf": [record({"t": {"const": t}, t: INTEGER}) for t in ("a", "b")]},
        [{"t": "a", "a": 1}, {"t": "b", "b": 1}],
        [{"t": "a", "b": 1}, {"t": "c"}, {"t": "a"}],
    ),
    "allOf": (
        {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}, {"multipleOf": 2}]},
        [4],
        [2, 3, 5, 6, "4"],
    ),
    "allOf of a reference": (
        {
            "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": INTEGER}, "required": ["b"]}],
            "$defs": {
                "base": {
                    "type": "object",
                    "properties": {"a": INTEGER, "in": {"$ref": "#/$defs/base"}},
                    "required": ["a"],
                }
            },
        },
        [{"a": 1, "b": 2}, {"a": 1, "in": {"a": 3}, "b": 2}],
        [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "in": {"a": 3, "b": 3}, "b": 2}],
    ),
    "allOf of objects": (
        {"allOf": [{"properties": {k: INTEGER}, "required": [k]} for k in "ab"], "type": "object"},
        [{"a": 1, "b": 2}],
        [{"a": 1}, {"b": 2}, {"a": "x", "b": 2}, {"a": 1, "b": 2, "c": 3}],
    ),
    "$ref": (
        record({"p": {"$ref": "#/$defs/p"}}) | {"$defs": {"p": POINT}},
        [{"p": {"x": 1, "y": 2}}],
        [{"p": {"x": 1}}, {"p": 1}, {}],
    ),
    "$ref beside keywords": (
        {"$ref": "#/$defs/i", "maximum": 5, "$defs": {"i": INTEGER}},
        [5, -3],
        [6, 9, "a"],
    ),
    "$ref to an anchor": (
        {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "integer"}}},
        [1],
        ["a", None],
    ),
    "$ref to an identity": (
        {
            "$id": "https://example.com/root",
            "type": "array",
            "items": {"$ref": "/part#/$defs/n"},
            "$defs": {
                "a": {
                    "$id": "part",
                    "$ref": "#here",
                    "$defs": {"n": {"$ref": "#here"}, "b": INTEGER},
                }
                | {"items": {"$anchor": "here", "type": "boolean"}}
            },
        },
        [[True], []],
        [[1], True],
    ),
    "$ref to itself": (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"v": 1, "next": None}, {"v": 1, "next": {"v": 2, "next": {"v": 3, "next": None}}}],
        [{"v": 1}, {"v": 1, "next": {"v": 2}}, {"v": 1, "next": 2}, None],
    ),
    "$ref to the root": (
        record({}, {"in": {"$ref": "#"}}),
        [{}, {"in": {}}, {"in": {"in": {"in": {}}}}],
        [{"out": {}}, {"in": 1}, {"in": {"out": {}}}],
    ),
    "not a pattern": (
        {"type": "string", "not": {"pattern": "^[a-c]|\\\\"}},
        ["", "da", '"', "😀\n"],
        ["a", "cb", "d\\"],
    ),
    "not an integer": (
        {"type": "number", "not": {"type": "integer"}, "maximum": 3},
        [1.5, -0.25, 2.75],
        [1, 0, 3, 3.5],
    ),
    "contains": (
        array(INTEGER, contains={"minimum": 5}, maxContains=1),
        [[5], [1, 7], [9, 0, 0]],
        [[], [1], [5, 6], ["a", 5]],
    ),
    "contains several": (
        {"type": "array", "contains": {"const": "x"}, "minContains": 2, "maxItems": 3},
        [["x", "x"], ["x", 1, "x"]],
        [["x"], ["x", 1], ["x", 1, 1, "x"]],
    ),
    "contains beside anything": (
        {
            "anyOf": [
                {"items": {"type": ["array", "object"]}},
                {"contains": {"type": "null"}, "maxContains": 1},
                {"properties": {"a": {"not": {"required": ["b"]}}}},
            ]
        },
        [[[]], [{}], [{"a": {"b": 1}}], [None], {"a": [{}]}, {"a": {}}],
        [],
    ),
    "few properties if one is there": (
        {"type": "object", "dependentSchemas": {"a": {"maxProperties": 1}}},
        [{}, {"a": 1}, {"b": 1, "c": 2}],
        [{"a": 1, "b": 1}],
    ),
    "a value evaluates nothing": (
        {"enum": [{"a": 1}, [1], {}, []], "unevaluatedProperties": False}
        | {"unevaluatedItems": False},
        [{}, []],
        [{"a": 1}, [1]],
    ),
    "uniqueItems of a list": (
        array({"enum": ["a", "b", None]}, uniqueItems=True),
        [[], ["b", "a"], [None, "a", "b"]],
        [["a", "a"], ["a", "b", "a"], ["c"]],
    ),
    "a condition on a pattern": (
        record({"country": {"type": "string"}, "code": {"type": "string"}})
        | {
            "if": {"properties": {"country": {"pattern": "^US"}}},
            "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
        },
        [{"country": "USA", "code": "12345"}, {"country": "DE", "code": "x"}],
        [{"country": "US", "code": "x"}, {"country": "DE"}],
    ),
    "oneOf of strings that overlap": (
        {"oneOf": [{"type": "string", "pattern": "a"}, {"type": "string", "maxLength": 2}]},
        ["", "b", "bac"],
        ["a", "ab", "bbb", 1],
    ),
    "patternProperties that overlap": (
        {"type": "object", "patternProperties": {"^a": INTEGER, "b$": {"minimum": 3}}},
        [{}, {"a": 1}, {"ab": 3}, {"b": 4, "ac": 0, "c": None}],
        [{"a": "x"}, {"ab": 2}, {"ab": "x"}, {"b": 1}],
    ),
    "patternProperties of objects apart, of which many overlap": (
        record(
            {
                f"{n}": {"type": "object", "patternProperties": {f"^a{{{n}}}": INTEGER}}
                for n in range(1, 9)
            }
        ),
        [{f"{n}": {"a" * n: n, "b": None} for n in range(1, 9)}],
        [{f"{n}": {"a" * n: None} for n in range(1, 9)}, {}],
    ),
    "unevaluatedProperties by branch": (
        {
            "type": "object",
            "anyOf": [{"properties": {"a": INTEGER}}, {"required": ["b"]}],
            "unevaluatedProperties": False,
        },
        [{}, {"a": 1}],
        [{"b": 1}, {"a": "x"}, {"a": 1, "b": 1}],
    ),
    "unevaluatedItems by branch": (
        {"type": "array", "unevaluatedItems": False, "anyOf": [{"prefixItems": [{}]}, {}]},
        [[], [1]],
        [[1, 2]],
    ),
    "$dynamicRef": (
        {
            "$id": "https://example.com/numbers",
            "$ref": "list",
            "$defs": {
                "n": {"$dynamicAnchor": "item", "type": "number"},
                "list": {
                    "$id": "list",
                    "type": "array",
                    "items": {"$dynamicRef": "#item"},
                    "$defs": {"any": {"$dynamicAnchor": "item"}},
                },
            },
        },
        [[], [1, 2.5]],
        [["a"], 1],
    ),
}
