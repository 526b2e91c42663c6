"""Where the schemas of a document are that have an identity: `$id`, `$anchor`, `$dynamicAnchor`."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urljoin

from .keywords import VALUES, Schema, escaped

IDENTITIES = ("$id", "$anchor", "$dynamicAnchor")


class Places:
    """Where the schemas are that have an identity.

    Attributes:
        bases: the identity of the resource that each schema is in, by the schema's pointer.
        dynamic: pointers to the dynamic anchors of each resource, by their names.
    """

    def __init__(self) -> None:
        self._of: dict[str, str] = {"": "#"}
        self.bases: dict[str, str] = {}
        self.dynamic: dict[str, dict[str, str]] = {}
        self.has_dynamic_references = False

    def collect(self, schema: Any, base: str, place: str) -> None:
        """Finds all identities within a schema; `base` is that of the one around it."""
        if isinstance(schema, list):
            for index, item in enumerate(schema):
                self.collect(item, base, f"{place}/{index}")
        if not isinstance(schema, dict):
            return
        base = base_of(schema, base)
        self.bases[f"#{place}"] = base
        for name in _identities(schema, base):
            self._of.setdefault(name, f"#{place}")
        if isinstance(anchor := schema.get("$dynamicAnchor"), str):
            self.dynamic.setdefault(base, {}).setdefault(anchor, f"#{place}")
        self.has_dynamic_references |= isinstance(schema.get("$dynamicRef"), str)
        for key, value in schema.items():
            if key not in VALUES:
                self.collect(value, base, f"{place}/{escaped(key)}")

    def rewritten(self, schema: Any, base: str) -> Any:
        """A copy of a schema with pointers for references."""
        if isinstance(schema, list):
            return [self.rewritten(item, base) for item in schema]
        if not isinstance(schema, dict):
            return schema
        base = base_of(schema, base)
        copy = {
            key: value if key in VALUES else self.rewritten(value, base)
            for key, value in schema.items()
            if not (key in IDENTITIES and isinstance(value, str))
        }
        if isinstance(copy.get("$ref"), str):
            copy["$ref"] = self.pointer(copy["$ref"], base)
        return copy

    def pointer(self, reference: str, base: str) -> str:
        """The pointer that a reference within a resource means, or itself if it leads out."""
        absolute = base + reference if reference.startswith("#") else urljoin(base, reference)
        document, _, fragment = absolute.partition("#")
        if absolute in self._of:
            return self._of[absolute]
        if document in self._of and (not fragment or fragment.startswith("/")):
            return self._of[document] + unquote(fragment)
        return reference


def base_of(schema: Schema, base: str) -> str:
    """The identity of the resource that a schema is in; `base` is that of the one around it."""
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
    if isinstance(schema.get("$dynamicAnchor"), str):
        found.append(f"{base}#{schema['$dynamicAnchor']}")
    return found


def target_of(schema: Schema, pointer: str) -> Any:
    """The part of a schema that a pointer like `#/$defs/a` names.

    Raises:
        LookupError: there is none.
    """
    target: Any = schema
    if pointer != "#" and not pointer.startswith("#/"):
        raise LookupError(pointer)
    for part in pointer.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(name)] if isinstance(target, list) else target[name]
        except (TypeError, ValueError, IndexError) as error:
            raise LookupError(pointer) from error
    return target
