"""`$dynamicRef` as `$ref`: what one means follows from the resources on the way to it.

Each schema that is referred to is copied once for every set of dynamic anchors under which it is
reached, so that within a copy each reference means one schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...protocol.errors import GrammarError
from .keywords import BY_NAME, VALUES, Schema
from .places import IDENTITIES, Places, base_of, target_of

_MAX_COPIES = 500
_DEFINITIONS = ("$defs", "definitions")
_Scope = Mapping[str, str]  # of a dynamic anchor by its name, the outermost on the way: a pointer


def with_fixed_references(schema: Schema, places: Places) -> Schema:
    """A copy whose references are pointers to definitions at its root, none of them dynamic.

    Raises:
        GrammarError: it would be too large.
    """
    return _Copier(schema, places).copied_root()


class _Copier:
    """Copies the schemas of a document that references lead to."""

    def __init__(self, root: Schema, places: Places) -> None:
        self._root = root
        self._places = places
        self._names: dict[tuple[str, frozenset[tuple[str, str]]], str] = {}
        self._uncopied: list[tuple[str, _Scope]] = []

    def copied_root(self) -> Schema:
        """The whole document."""
        copy: Schema = self._copied(self._root, "", {}, is_schema=True)
        definitions = {}
        while self._uncopied:
            pointer, scope = self._uncopied.pop()
            schema, base = self._found(pointer), self._places.bases.get(pointer, "")
            name = self._names[pointer, frozenset(scope.items())]
            if isinstance(schema, dict):  # `base` has its identity, which may be relative
                schema = {key: schema[key] for key in schema if key != "$id"}
            definitions[name] = self._copied(schema, base, scope, is_schema=True)
        return {**copy, "$defs": definitions}

    def _copied(self, schema: Any, base: str, scope: _Scope, *, is_schema: bool) -> Any:
        if isinstance(schema, list):
            return [self._copied(item, base, scope, is_schema=True) for item in schema]
        if not isinstance(schema, dict):
            return schema
        if is_schema:
            base = base_of(schema, base)
            scope = self._entered(scope, base)
        copy = {
            key: value
            if key in VALUES
            else self._copied(value, base, scope, is_schema=not is_schema or key not in BY_NAME)
            for key, value in schema.items()
            if not is_schema or key not in (*IDENTITIES, *_DEFINITIONS, "$dynamicRef")
        }
        if is_schema and isinstance(schema.get("$ref"), str):
            copy["$ref"] = self._reference(schema["$ref"], base, scope)
        if is_schema and isinstance(schema.get("$dynamicRef"), str):
            fixed = self._dynamic_reference(schema["$dynamicRef"], base, scope)
            copy["allOf"] = [*copy.get("allOf", []), {"$ref": fixed}]
        return copy

    def _entered(self, scope: _Scope, base: str) -> _Scope:
        """The scope within a resource: outer anchors go before its own."""
        return {**self._places.dynamic.get(base, {}), **scope}

    def _reference(self, reference: str, base: str, scope: _Scope) -> str:
        pointer = self._places.pointer(reference, base)
        return self._copy_of(pointer, scope) if self._is_found(pointer) else reference

    def _dynamic_reference(self, reference: str, base: str, scope: _Scope) -> str:
        pointer = self._places.pointer(reference, base)
        name = reference.partition("#")[2]
        if not self._is_found(pointer):
            return reference
        anchors = self._places.dynamic.get(self._places.bases.get(pointer, ""), {})
        is_dynamic = anchors.get(name) == pointer
        return self._copy_of(scope.get(name, pointer) if is_dynamic else pointer, scope)

    def _copy_of(self, pointer: str, scope: _Scope) -> str:
        """A reference to the copy of a schema that is reached in a scope."""
        scope = self._entered(scope, self._places.bases.get(pointer, ""))
        key = pointer, frozenset(scope.items())
        if key not in self._names:
            if len(self._names) == _MAX_COPIES:
                raise GrammarError(f'"$dynamicRef" makes more than {_MAX_COPIES} copies')
            last = re.sub("[^A-Za-z0-9_-]+", "_", pointer.rpartition("/")[2])
            self._names[key] = f"{last}_{len(self._names)}"
            self._uncopied.append((pointer, scope))
        return f"#/$defs/{self._names[key]}"

    def _is_found(self, pointer: str) -> bool:
        return pointer.startswith("#") and self._found(pointer) is not None

    def _found(self, pointer: str) -> Any:
        try:
            return target_of(self._root, pointer)
        except LookupError:
            return None
