"""What is demanded of a value: that it fits some schemas, and does not fit others."""

from __future__ import annotations

import json
from typing import Any

from ...protocol.errors import GrammarError
from ..schema.keywords import Schema
from ..schema.references import target_of

# The text of a schema, and whether the value fits it.
Demand = tuple[str, bool]
Demands = frozenset[Demand]
ANYTHING: Demands = frozenset()
NOTHING: Demands = frozenset([("false", True)])


class Schemas:
    """The schemas of a document, by their text: equal ones are the same.

    Args:
        root: the document, to which references are pointers.
    """

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._by_text: dict[str, Any] = {}

    def demand(self, schema: Any, *, holds: bool = True) -> Demands:
        """That a value fits a schema, or does not."""
        if schema is True or schema == {}:
            return ANYTHING if holds else NOTHING
        if schema is False:
            return NOTHING if holds else ANYTHING
        text = json.dumps(schema)
        self._by_text[text] = schema
        return frozenset([(text, holds)])

    def of(self, text: str) -> Any:
        """The schema of a text."""
        return False if text == "false" else self._by_text[text]

    def followed(self, pointer: Any) -> Any:
        """What a reference leads to.

        Raises:
            GrammarError: it leads to nothing.
        """
        target = self.found(pointer) if isinstance(pointer, str) else None
        if not isinstance(target, (dict, bool)):
            raise GrammarError(f'"$ref" {pointer} leads to nothing in the schema')
        return target

    def found(self, pointer: str) -> Any:
        """The same; None if it leads to nothing."""
        try:
            return target_of(self._root, pointer)
        except LookupError:
            return None
