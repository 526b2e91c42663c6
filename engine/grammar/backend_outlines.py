"""Grammars by outlines-core, a second library, which is optional: only this module imports it.

    regular expression, or JSON Schema of few keywords --> source --compile_index--> matcher

It makes a table of all states and of every token that is allowed in each: an index. Its translation
of schemas ignores what it does not know in silence, so only those keywords get to it that it
enforces exactly. A source begins with a mark, by which the engine knows the library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import GrammarError

try:
    import outlines_core
    from outlines_core.json_schema import build_regex_from_schema
except ImportError:  # an optional extra of the package
    outlines_core = None

_MARK = "outlines:"
_MISSING = "outlines-core is not installed: it is the package's extra `outlines`"
_MASK_WORD_BYTES = 4
# Of an index as the library writes it, which takes three times as much in memory.
_MAX_INDEX_BYTES = 32 * 1024 * 1024
_MAX_MASK_BYTES = 8 * 1024 * 1024  # of masks that are kept for an index
_MAX_INTEGER = 2**63  # beyond it the library has other numbers
_ANNOTATIONS = {
    "$comment", "$defs", "$schema", "default", "definitions", "deprecated", "description",
    "examples", "readOnly", "title", "writeOnly",
}  # fmt: skip
# Numbers that a schema leaves open: a model could write digits until it may write no more.
_BOUNDS = {
    "[1-9][0-9]*": "[1-9][0-9]{0,17}",
    r"(\.[0-9]+)?([eE][+-][0-9]+)?": r"(\.[0-9]{1,17})?([eE][+-][0-9]{1,2})?",
}
_KEYWORDS: dict[str, set[str]] = {
    "boolean": set(),
    "null": set(),
    "integer": set(),
    "number": set(),
    "string": {"minLength", "maxLength"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_SIZES = (("minLength", "maxLength"), ("minItems", "maxItems"))


def is_installed() -> bool:
    """Whether the library is there."""
    return outlines_core is not None


def is_ours(source: str) -> bool:
    """Whether a source is of this library."""
    return source.startswith(_MARK)


def pattern_of(source: str) -> str:
    """The regular expression of a source."""
    return source.removeprefix(_MARK)


def regex_source(pattern: str) -> str:
    """The source of a regular expression, which the whole text must match.

    Raises:
        GrammarError: the library is not installed.
    """
    if outlines_core is None:
        raise GrammarError(_MISSING)
    return _MARK + pattern


def json_source(schema: dict[str, Any]) -> str:
    """The source of a JSON Schema. In its texts a space may follow, or not, where JSON allows it.

    Raises:
        GrammarError: a keyword would be ignored or read in another way; it is named with its place.
    """
    if outlines_core is None:
        raise GrammarError(_MISSING)
    plain = _Reader(schema).read(schema, "#", ())
    pattern = str(build_regex_from_schema(json.dumps(plain)))
    for endless, bounded in _BOUNDS.items():  # texts of the schema are escaped: none looks like it
        pattern = pattern.replace(endless, bounded)
    return _MARK + pattern


class _Reader:
    """Reads a schema into one that has only what the library enforces, references resolved."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root

    def read(self, schema: Any, place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        """A schema's equal; `seen` are the references that led to it.

        Raises:
            GrammarError: there is none.
        """
        if not isinstance(schema, dict):
            raise _cannot("this", place)
        keys = schema.keys() - _ANNOTATIONS
        if keys == {"$ref"}:
            return self._referenced(schema["$ref"], place, seen)
        if keys == {"anyOf"} and isinstance(schema["anyOf"], list):
            choices = enumerate(schema["anyOf"])
            return {"anyOf": [self.read(c, f"{place}/anyOf/{i}", seen) for i, c in choices]}
        if keys <= {"enum", "const", "type"} and keys & {"enum", "const"}:
            return _choice(schema, place)
        return self._typed(schema, keys, place, seen)

    def _referenced(self, reference: Any, place: str, seen: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise _cannot("$ref", place)
        if reference in seen:
            raise GrammarError(f"outlines-core cannot enforce a schema in itself, at {place}/$ref")
        target: Any = self._root
        for part in reference[2:].split("/"):
            if not isinstance(target, dict) or part not in target:
                raise _cannot("$ref", place)
            target = target[part]
        return self.read(target, reference, (*seen, reference))

    def _typed(
        self, schema: dict[str, Any], keys: set[str], place: str, seen: tuple[str, ...]
    ) -> dict[str, Any]:
        kind = schema.get("type")
        if not isinstance(kind, str) or kind not in _KEYWORDS:
            raise GrammarError(f"outlines-core needs a single `type` at {place}")
        for key in sorted(keys - _KEYWORDS[kind] - {"type"}):
            raise _cannot(key, place)
        plain = {key: schema[key] for key in keys}
        _check_sizes(plain, place)
        if kind == "array":
            plain["items"] = self.read(schema.get("items"), f"{place}/items", seen)
        if kind == "object":
            _check_object(plain, place)
            plain["properties"] = {
                name: self.read(value, f"{place}/properties/{name}", seen)
                for name, value in plain["properties"].items()
            }
        return plain


def _cannot(key: str, place: str) -> GrammarError:
    return GrammarError(f"outlines-core cannot enforce `{key}` at {place}/{key}")


def _choice(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A choice of values that the library writes as they are."""
    key = "enum" if "enum" in schema else "const"
    values = schema["enum"] if key == "enum" else [schema["const"]]
    if {"enum", "const"} <= schema.keys() or not isinstance(values, list) or not values:
        raise _cannot(key, place)
    kinds = {str: "string", bool: "boolean", int: "integer", type(None): "null"}
    for value in values:
        kind = kinds.get(type(value))
        is_large = type(value) is int and not -_MAX_INTEGER <= value < _MAX_INTEGER
        if kind is None or is_large or schema.get("type", kind) != kind:
            raise GrammarError(f"outlines-core cannot enforce {value!r} at {place}/{key}")
    return {"enum": values}


def _check_sizes(schema: dict[str, Any], place: str) -> None:
    for low, high in _SIZES:
        for key in (low, high):
            if key in schema and (type(schema[key]) is not int or schema[key] < 0):
                raise _cannot(key, place)
        if schema.get(low, 0) > schema.get(high, schema.get(low, 0)):
            raise _cannot(low, place)


def _check_object(schema: dict[str, Any], place: str) -> None:
    """The library takes an object for closed, and writes properties in the schema's order."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties:
        raise _cannot("properties", place)
    if not isinstance(required, list) or not all(name in properties for name in required):
        raise _cannot("required", place)
    if schema.get("additionalProperties", False) is not False:
        raise _cannot("additionalProperties", place)
    for name in properties:
        if json.dumps(name, ensure_ascii=False) != f'"{name}"':  # it would be written in two ways
            raise GrammarError(f"outlines-core cannot enforce the name {name!r} at {place}")


class OutlinesMatcher:
    """The state of a sequence in an index."""

    __slots__ = ("_guide", "_has_ended", "_index", "_is_wrong", "_tokens")

    def __init__(self, index: CompiledIndex) -> None:
        self._index = index
        self._guide = outlines_core.Guide(index.raw)
        self._tokens: list[int] = []
        self._has_ended = False
        self._is_wrong = False

    def copy(self) -> OutlinesMatcher:
        """Another matcher in the same state; takes time for each token so far."""
        self.check()
        matcher = OutlinesMatcher(self._index)
        matcher.advance(self._tokens)
        return matcher

    def advance(self, token_ids: Sequence[int]) -> None:
        """Consumes tokens.

        Raises:
            GrammarError: the grammar does not allow them.
        """
        self.check()
        for token_id in token_ids:
            if token_id in self._index.eos_token_ids and not self._has_ended:
                self._has_ended = True
                self._is_wrong = not self._guide.is_finished()
            else:
                self._step(token_id)
            self.check()
            self._tokens.append(token_id)

    def _step(self, token_id: int) -> None:
        try:
            self._guide.advance(token_id, return_tokens=False)
        except (ValueError, OverflowError):
            self._is_wrong = True
        self._is_wrong |= self._has_ended

    def forced(self) -> list[int]:
        """None: where one text must follow, the first part of it may come alone, or all at once."""
        self.check()
        return []

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return self._has_ended or (self._guide.is_finished() and self._index.ends(self._guide))

    def check(self) -> None:
        """Raises an error of an earlier call.

        Raises:
            GrammarError: a token came that is not allowed.
        """
        if self._is_wrong:
            raise GrammarError("the grammar does not allow this token")

    def fill(self, words: NDArray[np.int32]) -> None:
        """Writes the mask of the next token: int32 [ceil(vocab_size / 32)], contiguous."""
        if not self._is_wrong:
            words[:] = self._index.mask(self._guide)

    @property
    def num_bytes(self) -> int:
        """About what the index takes in memory; its matchers share it."""
        return 3 * self._index.num_bytes


class CompiledIndex:
    """An index, and the masks of its states that were needed so far."""

    def __init__(self, raw: Any, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self.raw = raw
        self.eos_token_ids = eos_token_ids
        self.num_bytes = len(raw.__reduce__()[1][0])
        self._num_words = -(-vocab_size // 32)
        self._masks: dict[int, NDArray[np.int32]] = {}
        self._over: dict[int, bool] = {}

    def mask(self, guide: Any) -> NDArray[np.int32]:
        """The mask of a state. The library takes up to a millisecond for it."""
        state = guide.get_state()
        words = self._masks.get(state)
        if words is None:
            words = self._new_mask(guide)
            if len(self._masks) * words.nbytes > _MAX_MASK_BYTES:
                self._masks.clear()
            self._masks[state] = words
        return words

    def ends(self, guide: Any) -> bool:
        """Whether no text follows a final state."""
        state = guide.get_state()
        if state not in self._over:
            bits = np.unpackbits(self.mask(guide).view(np.uint8), bitorder="little")
            self._over[state] = set(np.flatnonzero(bits).tolist()) <= self.eos_token_ids
        return self._over[state]

    def _new_mask(self, guide: Any) -> NDArray[np.int32]:
        words = np.zeros(self._num_words, dtype=np.int32)
        guide.write_mask_into(words.ctypes.data, words.size, _MASK_WORD_BYTES)
        bits = words.view(np.uint8)
        for token_id in self.eos_token_ids if guide.is_finished() else ():
            bits[token_id // 8] |= 1 << token_id % 8
        return words


def compile_index(
    source: str, vocabulary: Any, eos_token_ids: frozenset[int], vocab_size: int
) -> OutlinesMatcher:
    """Compiles a source over a `vocabulary`; another thread may run meanwhile.

    Raises:
        GrammarError: the source is no expression, allows no text, or needs too much memory.
    """
    if outlines_core is None:
        raise GrammarError(_MISSING)
    # Without the end the first alternative that matches would hide longer ones: `a|ab`.
    pattern = rf"(?:{pattern_of(source)})\z"
    try:
        index = CompiledIndex(outlines_core.Index(pattern, vocabulary), eos_token_ids, vocab_size)
    except ValueError as error:
        raise GrammarError(_reason(str(error))) from error
    if index.num_bytes > _MAX_INDEX_BYTES:
        raise GrammarError("outlines-core needs too much memory for it")
    return OutlinesMatcher(index)


def _reason(error: str) -> str:
    """Why there is no index, in a caller's terms."""
    if "universal start" in error:
        return "outlines-core cannot enforce what may be empty or begins with an assertion"
    if "vocabulary" in error.lower():
        return "outlines-core finds no tokens for a part of it"
    return " ".join(error.split())


def make_vocabulary(texts: dict[bytes, list[int]], eos_token_ids: frozenset[int]) -> Any:
    """The texts of a tokenizer's tokens, for `compile_index`.

    Raises:
        GrammarError: the library is not installed, or no token ends a text.
    """
    if outlines_core is None:
        raise GrammarError(_MISSING)
    if not eos_token_ids:
        raise GrammarError("outlines-core needs a token that ends a text")
    return outlines_core.Vocabulary(min(eos_token_ids), texts)
