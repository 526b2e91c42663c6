"""What is read out of a schema: which objects are closed, and over which names."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar.schema import read_schema
from engine.protocol.errors import GrammarError

Schema = dict[str, Any]
ANY: Schema = {"type": "boolean"}


def listing(*names: str, **keywords: Any) -> Schema:
    """An object that lists properties and says nothing about others."""
    return {"type": "object", "properties": dict.fromkeys(names, ANY), **keywords}


def closed(*names: str, **keywords: Any) -> Schema:
    """The same without others."""
    return {**listing(*names, **keywords), "additionalProperties": False}


class TestObjects:
    """Which objects have no properties but those listed."""

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "object"},
            {"type": "object", "required": ["a"]},
            listing("a", additionalProperties=True),
            listing("a", additionalProperties=ANY),
            {"type": "object", "patternProperties": {"^a": ANY}},
        ],
    )
    def test_that_list_none_or_speak_of_others_stay_as_they_are(self, schema: Schema) -> None:
        assert read_schema(schema) == schema

    def test_that_list_some_are_closed_everywhere(self) -> None:
        assert read_schema(listing()) == closed()
        assert read_schema(listing("a")) == closed("a")
        inner = {"type": "array", "items": {"anyOf": [listing("a"), ANY]}}
        expected = {"type": "array", "items": {"anyOf": [closed("a"), ANY]}}
        assert read_schema(inner) == expected
        both = {"type": "object", "additionalProperties": listing("b")}
        assert read_schema(both) == {"type": "object", "additionalProperties": closed("b")}

    def test_have_what_they_require(self) -> None:
        read = read_schema(listing("a", required=["a", "z"]))
        assert read["properties"] == {"a": ANY, "z": True}
        assert read["additionalProperties"] is False

    @pytest.mark.parametrize(
        "schema",
        [
            {"allOf": [listing("a"), listing("b")]},
            {"allOf": [listing("a")], **listing("b")},
            {"$ref": "#/$defs/a", **listing("b"), "$defs": {"a": listing("a")}},
            {"anyOf": [listing("a"), {"type": "null"}], "required": ["b"]},
        ],
    )
    def test_of_which_several_schemas_speak_are_closed_as_a_whole(self, schema: Schema) -> None:
        read = read_schema(schema)
        assert read["properties"].keys() == {"a", "b"}
        assert read["additionalProperties"] is False
        parts = [*read.get("allOf", ()), *read.get("anyOf", ()), *read.get("$defs", {}).values()]
        assert all("additionalProperties" not in part for part in parts)

    def test_stay_open_if_one_of_several_schemas_says_so(self) -> None:
        schema = {"allOf": [listing("a"), listing("b", additionalProperties=True)]}
        assert read_schema(schema) == schema

    def test_that_are_a_part_and_stand_alone_are_read_twice(self) -> None:
        base = listing("a")
        schema = {"allOf": [{"$ref": "#/$defs/base"}, listing("b")]}
        whole = {**listing("x", "y"), "$defs": {"base": base}}
        whole["properties"] = {"x": schema, "y": {"$ref": "#/$defs/base"}}
        assert sorted(map(str, read_schema(whole)["$defs"].values())) == sorted(
            map(str, [base, closed("a")])
        )


class TestChoices:
    """`oneOf` of schemas that nothing fits twice is `anyOf`."""

    @pytest.mark.parametrize(
        "schemas",
        [
            [{"type": "integer"}, {"type": ["string", "null"]}],
            [{"const": 1}, {"enum": [2, "1"]}, {"const": True}],
            [listing("a"), {"type": "array"}],
            [{"$ref": "#/$defs/a"}, {"type": "string"}],
            [
                listing("a")
                | {"properties": {"v": {"type": name}}, "required": ["v"] * (name == "null")}
                for name in ("null", "array")
            ],
            [
                listing(t=1, required=["t"]) | {"properties": {"t": {"const": name}}}
                for name in ("x", "y")
            ],
        ],
    )
    def test_that_are_apart(self, schemas: list[Schema]) -> None:
        read = read_schema({"oneOf": schemas, "$defs": {"a": {"type": "null"}}})
        assert len(read["anyOf"]) == len(schemas)
        assert "oneOf" not in read

    @pytest.mark.parametrize(
        "schemas",
        [
            [{"type": "integer"}, {"type": "number"}],
            [{"const": 1}, {"enum": [2, 1.0]}],
            [{"pattern": "a"}, {"minLength": 2}],
            [{"items": {}}, {"required": ["a"]}],
        ],
    )
    def test_that_may_overlap_are_refused(self, schemas: list[Schema]) -> None:
        with pytest.raises(GrammarError, match=r'"oneOf" .* at #/items'):
            read_schema({"items": {"oneOf": schemas}})

    def test_that_may_overlap_exclude_each_other_where_that_can_be_said(self) -> None:
        read = read_schema(listing("a", "b", oneOf=[{"required": ["a"]}, {"required": ["b"]}]))
        first, second = read["allOf"][0]["anyOf"]
        absent = {"type": "object", "properties": {"b": False}}
        assert first == {"allOf": [{"required": ["a"]}, {"anyOf": [absent]}]}
        assert second["allOf"][0] == {"required": ["b"]}


class TestErrors:
    """What cannot be enforced is named with its place."""

    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            (listing(q={}) | {"uniqueItems": True}, '"uniqueItems" cannot be enforced, at #'),
            ({"items": {"not": {"items": {}}}}, '"not" cannot be enforced, at #/items'),
            ({"anyOf": [{}, {"contains": {}}]}, '"contains" cannot be enforced, at #/anyOf/1'),
            (
                {"$ref": "#/x~1y", "x/y": {"if": {"items": {}}, "then": {}}},
                '"if", "then" .* at #/x~1y',
            ),
            ({"$ref": "other"}, '"\\$ref" other leads to nothing in the schema, at #'),
            (
                {"properties": {"a": {"maximum": -(2**60) - 1}}},
                "the number -1152921504606846977 .* at #/properties/a/maximum",
            ),
        ],
    )
    def test_name_keyword_and_place(self, schema: Schema, words: str) -> None:
        with pytest.raises(GrammarError, match=words):
            read_schema(schema)

    def test_are_not_raised_for_what_is_not_referred_to(self) -> None:
        assert read_schema({"$defs": {"a": {"uniqueItems": True}}}) == {}

    def test_are_not_raised_with_best_effort(self) -> None:
        assert read_schema({"uniqueItems": True}, best_effort=True) == {}
