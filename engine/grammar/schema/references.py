"""References of a schema, which may name any part of it by a pointer, an anchor or an identity."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urljoin

from .keywords import VALUES, Schema, escaped

_IDENTITIES = ("$id", "$anchor")


def with_local_references(schema: Schema) -> Schema:
    """A copy whose references are pointers from its root, like `#/$defs/a`, without identities.

    A reference that leads out of the schema stays as it is.
    """
    places = _Places()
    places.collect(schema, "", "")
    copy: Schema = places.rewritten(schema, "")
    return copy


def target_of(schema: Schema, pointer: str) -> Any:
    """The part of a schema that a pointer like `#/$defs/a` names.

    Raises:
        LookupError: there is none.
    """
    target: Any = schema
    if not pointer.startswith("#"):
        raise LookupError(pointer)
    for part in pointer.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(name)] if isinstance(target, list) else target[name]
        except (TypeError, ValueError, IndexError) as error:
            raise LookupError(pointer) from error
    return target


class _Places:
    """Where the schemas are that have an identity."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {"": "#"}

    def collect(self, schema: Any, base: str, place: str) -> None:
        """Finds all identities within a schema; `base` is that of the one around it."""
        if isinstance(schema, list):
            for index, item in enumerate(schema):
                self.collect(item, base, f"{place}/{index}")
        if not isinstance(schema, dict):
            return
        base = _base(schema, base)
        for name in _identities(schema, base):
            self._of.setdefault(name, f"#{place}")
        for key, value in schema.items():
            if key not in VALUES:
                self.collect(value, base, f"{place}/{escaped(key)}")

    def rewritten(self, schema: Any, base: str) -> Any:
        """A copy of a schema with pointers for references."""
        if isinstance(schema, list):
            return [self.rewritten(item, base) for item in schema]
        if not isinstance(schema, dict):
            return schema
        base = _base(schema, base)
        copy = {
            key: value if key in VALUES else self.rewritten(value, base)
            for key, value in schema.items()
            if not (key in _IDENTITIES and isinstance(value, str))
        }
        if isinstance(copy.get("$ref"), str):
            copy["$ref"] = self._pointer(copy["$ref"], base)
        return copy

    def _pointer(self, reference: str, base: str) -> str:
        absolute = base + reference if reference.startswith("#") else urljoin(base, reference)
        document, _, fragment = absolute.partition("#")
        if absolute in self._of:
            return self._of[absolute]
        if document in self._of and (not fragment or fragment.startswith("/")):
            return self._of[document] + unquote(fragment)
        return reference


def _base(schema: Schema, base: str) -> str:
    identity = schema.get("$id")
    if not isinstance(identity, str) or identity.startswith("#"):
        return base
    return urljoin(base, identity).partition("#")[0]


def _identities(schema: Schema, base: str) -> list[str]:
    found = []
    if isinstance(schema.get("$id"), str):
        found.append(base + schema["$id"] if schema["$id"].startswith("#") else base)
    if isinstance(schema.get("$anchor"), str):
        found.append(f"{base}#{schema['$anchor']}")
    return found
