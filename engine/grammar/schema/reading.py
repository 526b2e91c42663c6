"""Reading a schema: objects are closed, choices are told apart, and what says nothing goes.

An object that lists its properties and says nothing about others has no others, as in TGI: a model
invents none, and what it writes still fits the schema that was given. Where several schemas speak
of one object, it may have the properties that any of them lists.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...protocol.errors import GrammarError
from .applicators import exactly_one, without_applicators
from .choices import are_apart
from .evaluated import without_unevaluated
from .keywords import (
    ANNOTATIONS,
    IN_PLACE,
    LISTS,
    OF_ARRAYS,
    OF_OBJECTS,
    SIZES,
    UNENFORCEABLE,
    Schema,
    Unlisted,
    UnsaidError,
    escaped,
    items,
    strings,
)
from .numbers import with_exact_numbers
from .references import target_of, with_local_references
from .strings import with_known_strings

_IGNORED = ANNOTATIONS | {"$defs", "definitions"}  # what is referred to is read then


def read_schema(
    schema: Schema, *, best_effort: bool = False, strict_formats: bool = False
) -> Schema:
    """A schema without annotations, whose objects are closed unless they say otherwise.

    With `best_effort` keywords that cannot be enforced are ignored; with `strict_formats` formats
    that are unknown are refused.

    Raises:
        GrammarError: a keyword or a number cannot be enforced; it names both and the place.
    """
    reader = _Reader(
        with_local_references(schema), best_effort=best_effort, strict_formats=strict_formats
    )
    return reader.read_root()


@dataclass(frozen=True, slots=True)
class _Part:
    """That a schema is one of several that speak of the same object, which another one closes.

    Attributes:
        shared: properties of which several of them speak; None if that is unknown.
    """

    shared: frozenset[str] | None

    def of(self, name: str) -> _Part | None:
        """The same for the value of a property."""
        return _ANY_PART if self.shared is None or name in self.shared else None


_ANY_PART = _Part(None)


class _Reader:
    """Reads the parts of a schema, and those that they refer to."""

    def __init__(self, root: Schema, *, best_effort: bool, strict_formats: bool) -> None:
        self._root = root
        self._best_effort = best_effort
        self._strict_formats = strict_formats
        self._names: dict[tuple[str, _Part | None], str] = {}
        self._unread: list[tuple[str, _Part | None]] = []

    def read_root(self) -> Schema:
        """The whole schema; what it refers to is in its `$defs`."""
        result = self._read(self._root, "#", None)
        if not isinstance(result, dict):
            if not result:
                raise GrammarError("unsatisfiable: nothing fits it")
            result = {}
        definitions = {}
        while self._unread:
            pointer, part = self._unread.pop()
            schema = target_of(self._root, pointer)
            definitions[self._names[pointer, part]] = self._read(schema, pointer, part)
        return {**result, "$defs": definitions} if definitions else result

    def _read(self, given: Any, place: str, part: _Part | None) -> Any:
        """A schema that is the only one that speaks of its value, unless it is a `part`."""
        if not isinstance(given, dict):
            return given
        schema = self._known(given, place)
        if not isinstance(schema, dict):
            return schema
        inner, closing = part, None
        if part is None:
            speakers = list(self._speakers(schema, set()))
            closing = self._closing(schema, speakers)
            inner = _Part(_shared_names(speakers)) if _is_shared(schema) else None
        is_alone = inner is None and not any(key in schema for key in (*IN_PLACE, "$ref"))
        schema = with_exact_numbers(schema, place, fill=is_alone)
        result = {
            key: self._read_value(key, value, f"{place}/{escaped(key)}", schema, inner)
            for key, value in schema.items()
        }
        if closing is not None:
            result["properties"] = {**result.get("properties", {}), **closing}
            result["additionalProperties"] = False
        return result

    def _known(self, given: Schema, place: str) -> Any:
        """The same schema in those words that can be enforced; it may be a boolean.

        Raises:
            GrammarError: there are other words in it.
        """
        schema = without_applicators({key: given[key] for key in given if key not in _IGNORED})
        if not isinstance(schema, dict):
            return schema
        if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
            schema = without_unevaluated(schema, list(self._speakers(schema, set())))
        refused = [key for key in schema if key in UNENFORCEABLE]
        if refused and not self._best_effort:
            words = ", ".join(f'"{key}"' for key in refused)
            raise UnsaidError(f"{words} cannot be enforced, at {place}")
        schema = {key: schema[key] for key in schema if key not in refused}
        if "oneOf" in schema and (self._best_effort or self._is_exclusive(schema["oneOf"])):
            schema = _with_any_of(schema)
        elif "oneOf" in schema:
            one = exactly_one(items(schema.pop("oneOf")))
            if one is None:
                raise UnsaidError(f'"oneOf" of schemas that overlap cannot be enforced, at {place}')
            schema["allOf"] = [*items(schema.get("allOf")), one]
        schema = {key: _whole(key, value) for key, value in schema.items()}
        return with_known_strings(schema, place, strict_formats=self._strict_formats)

    def _is_exclusive(self, one_of: Any) -> bool:
        """Whether at most one of the schemas of a `oneOf` can fit."""
        return isinstance(one_of, list) and are_apart(one_of, self._followed)

    def _read_value(
        self, key: str, value: Any, place: str, schema: Schema, inner: _Part | None
    ) -> Any:
        if key == "$ref":
            return self._reference(value, place.removesuffix("/$ref"), inner)
        if key in ("properties", "patternProperties") and isinstance(value, dict):
            return {
                name: self._read(
                    item, f"{place}/{escaped(name)}", _inside(key, name, schema, inner)
                )
                for name, item in value.items()
            }
        if key in LISTS and isinstance(value, list):
            part = _ANY_PART if inner and key not in IN_PLACE else inner
            return [self._read(item, f"{place}/{at}", part) for at, item in enumerate(value)]
        if key in ("items", "additionalProperties"):
            return self._read(value, place, _ANY_PART if inner else None)
        return value

    def _reference(self, pointer: Any, place: str, part: _Part | None) -> str:
        if not isinstance(pointer, str) or self._followed(pointer) is None:
            raise GrammarError(f'"$ref" {pointer} leads to nothing in the schema, at {place}')
        if pointer == "#" and part is None:
            return pointer
        name = self._names.get((pointer, part))
        if name is None:
            name = re.sub("[^A-Za-z0-9_-]+", "_", pointer.rpartition("/")[2])
            if name in self._names.values():
                name = f"{name}_{len(self._names)}"
            self._names[pointer, part] = name
            self._unread.append((pointer, part))
        return f"#/$defs/{name}"

    def _followed(self, pointer: str) -> Any:
        try:
            return target_of(self._root, pointer)
        except LookupError:
            return None

    def _speakers(self, schema: Any, seen: set[str]) -> Iterator[Schema]:
        """All schemas that speak of the same value as one, itself too."""
        if not isinstance(schema, dict):
            return
        yield schema
        for key in IN_PLACE:
            for part in items(schema.get(key)):
                yield from self._speakers(part, seen)
        pointer = schema.get("$ref")
        if isinstance(pointer, str) and pointer not in seen:
            seen.add(pointer)
            yield from self._speakers(self._followed(pointer), seen)

    def _closing(self, schema: Schema, speakers: list[Schema]) -> Schema | None:
        """The properties to add to a schema that nobody else closes; None if it stays open."""
        if not _is_shared(schema):
            if "additionalProperties" in schema:
                return None
            speakers = [schema]
        elif any(self._is_open(speaker) for speaker in speakers):
            return None
        if not any(map(_lists, speakers)):
            return None
        own = schema.get("properties", {})
        names = [name for speaker in speakers for name in _names(speaker)]
        return {name: True for name in names if name not in own}

    def _is_open(self, speaker: Schema) -> bool:
        """Whether other properties than those listed are spoken of, or cannot be ruled out."""
        if "additionalProperties" in speaker or "patternProperties" in speaker:
            return True
        return "oneOf" in speaker and not self._is_exclusive(speaker["oneOf"])


def _with_any_of(schema: Schema) -> Schema:
    """A `oneOf` as an `anyOf`, in its place."""
    if "anyOf" not in schema:
        return {"anyOf" if key == "oneOf" else key: schema[key] for key in schema}
    one = {"anyOf": schema["oneOf"]}
    kept = {key: schema[key] for key in schema if key != "oneOf"}
    return {**kept, "allOf": [*items(schema.get("allOf")), one]}


def _whole(key: str, value: Any) -> Any:
    """A size like 2.0 as an integer."""
    is_whole = key in SIZES and isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


def _inside(key: str, name: str, schema: Schema, inner: _Part | None) -> _Part | None:
    """What the schema of a property is a part of."""
    if inner is not None:
        return inner.of(name) if key == "properties" else _ANY_PART
    both = "properties" in schema and "patternProperties" in schema
    return _ANY_PART if both else None


def _is_shared(schema: Schema) -> bool:
    """Whether several schemas speak of one value, each of which may list its own properties."""
    number = len(items(schema.get("allOf"))) + sum(key in schema for key in ("anyOf", "oneOf"))
    own = any(key in schema for key in (*OF_OBJECTS, *OF_ARRAYS))
    return number + ("$ref" in schema) + own > 1


def _shared_names(speakers: list[Schema]) -> frozenset[str] | None:
    """Properties of which several schemas speak; None if that cannot be told."""
    for speaker in speakers:
        if "patternProperties" in speaker or isinstance(speaker.get("additionalProperties"), dict):
            return None
    counts = Counter(name for speaker in speakers for name in _declared(speaker))
    return frozenset(name for name, count in counts.items() if count > 1)


def _names(schema: Schema) -> list[str]:
    return [*_declared(schema), *strings(schema.get("required"))]


def _declared(schema: Schema) -> Schema:
    return schema["properties"] if _lists(schema) else {}


def _lists(schema: Schema) -> bool:
    """Whether a schema lists properties, though perhaps none."""
    properties = schema.get("properties")
    return isinstance(properties, dict) and not isinstance(properties, Unlisted)
