"""What a caller asks of the form of a text. Knows nothing of how that is enforced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the text: `kind` is "json" (`value` is a JSON Schema), "regex", or unknown.

    With `or_text` a text that does not begin with a brace is free.
    """

    kind: str
    value: Any
    or_text: bool = False
