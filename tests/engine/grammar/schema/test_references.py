"""References of a schema as pointers from its root."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar.schema.references import target_of, with_local_references


def pointer(reference: str, schema: dict[str, Any]) -> str:
    """What a reference at the root of a schema becomes."""
    result = with_local_references({**schema, "properties": {"here": {"$ref": reference}}})
    return str(result["properties"]["here"]["$ref"])


DOCUMENT = {
    "$id": "https://example.org/dir/root.json",
    "$defs": {
        "a": {"$anchor": "a", "type": "null"},
        "b": {"$id": "other.json", "$defs": {"c": {"$anchor": "c"}, "d": {"$ref": "#/$defs/c"}}},
        "e/f": {"$id": "urn:example:e", "$defs": {"g": {"$ref": "#g"}, "h": {"$anchor": "g"}}},
        "i": {"enum": [{"$id": "j", "$ref": "#/$defs/a"}]},
    },
}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("#", "#"),
        ("#/$defs/a", "#/$defs/a"),
        ("#/$defs/e~1f", "#/$defs/e~1f"),
        ("#/$defs/e~1f/%24defs", "#/$defs/e~1f/$defs"),
        ("#a", "#/$defs/a"),
        ("root.json", "#"),
        ("/dir/root.json#a", "#/$defs/a"),
        ("https://example.org/dir/root.json#/$defs/a", "#/$defs/a"),
        ("other.json", "#/$defs/b"),
        ("other.json#/$defs/c", "#/$defs/b/$defs/c"),
        ("other.json#c", "#/$defs/b/$defs/c"),
        ("urn:example:e", "#/$defs/e~1f"),
        ("urn:example:e#g", "#/$defs/e~1f/$defs/h"),
        ("urn:example:e#/$defs/g", "#/$defs/e~1f/$defs/g"),
        ("#c", "#c"),
        ("j", "j"),
        ("https://example.org/else", "https://example.org/else"),
    ],
)
def test_become_pointers(reference: str, expected: str) -> None:
    assert pointer(reference, DOCUMENT) == expected


def test_are_relative_to_the_nearest_identity() -> None:
    result = with_local_references(DOCUMENT)
    assert result["$defs"]["b"]["$defs"]["d"] == {"$ref": "#/$defs/b/$defs/c"}
    assert result["$defs"]["e/f"]["$defs"]["g"] == {"$ref": "#/$defs/e~1f/$defs/h"}
    assert result["$defs"]["i"] == DOCUMENT["$defs"]["i"]
    assert target_of(result, "#/$defs/a") == {"type": "null"}


@pytest.mark.parametrize(
    "name", ["#/x", "#x", "#/$defs/i/enum/1", "#/$defs/i/enum/x", "j", "#/$id/0"]
)
def test_to_nothing_have_no_target(name: str) -> None:
    with pytest.raises(LookupError):
        target_of(with_local_references(DOCUMENT), name)


def test_an_identity_that_is_a_folder_holds_beside_dynamic_references() -> None:
    definitions = {
        "list": {"$id": "folder/", "items": {"$ref": "item.json"}},
        "item": {"$id": "folder/item.json", "type": "integer"},
        "other": {"$dynamicAnchor": "x", "$dynamicRef": "#x"},
    }
    root = {"$id": "https://example.org/root.json", "$ref": "folder/", "$defs": definitions}
    result = with_local_references(root)
    items = target_of(result, result["$ref"])["items"]
    assert target_of(result, items["$ref"]) == {"type": "integer"}
