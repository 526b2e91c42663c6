"""References of a schema, which may name any part of it by a pointer, an anchor or an identity."""

from __future__ import annotations

from .dynamic_references import with_fixed_references
from .keywords import Schema
from .places import Places, target_of

__all__ = ["target_of", "with_local_references"]


def with_local_references(schema: Schema) -> Schema:
    """A copy whose references are pointers from its root, like `#/$defs/a`, without identities.

    A reference that leads out of the schema stays as it is.
    """
    places = Places()
    places.collect(schema, "", "")
    if places.has_dynamic_references:
        return with_fixed_references(schema, places)
    copy: Schema = places.rewritten(schema, "")
    return copy
