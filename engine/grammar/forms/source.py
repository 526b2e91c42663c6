"""The grammar of a schema, by its forms."""

from __future__ import annotations

from typing import Any

from ..schema.keywords import Schema
from .demands import Schemas
from .expansion import Expansion
from .productions import Productions
from .writer import Writer


def lark_source(
    schema: Schema,
    json_options: dict[str, Any],
    *,
    strict_formats: bool = False,
    are_closed: bool = True,
) -> tuple[str, str]:
    """The rules of what fits a schema, in Lark, behind the name of the first of them.

    Args:
        schema: its references are pointers from its root.
        json_options: the library's options for JSON.
        strict_formats: whether unknown formats are refused.
        are_closed: whether objects that list properties have no others.

    Raises:
        GrammarError: the schema cannot be said exactly, needs too much work, or nothing fits it.
    """
    schemas = Schemas(schema)
    expansion = Expansion(schemas, strict_formats=strict_formats, are_closed=are_closed)
    return Writer(expansion, Productions(json_options)).lark(schemas.demand(schema))
