"""A caller's constraint on a text. How it is enforced is not known here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the text: `kind` is "json" (`value` is a JSON Schema), "regex", or unknown.

    With `or_text` a text that does not begin with a brace is not constrained.
    """

    kind: str
    value: Any
    or_text: bool = False
