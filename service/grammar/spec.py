"""A caller's constraint on a text. How it is enforced is not known here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["auto", "llguidance", "outlines"]  # the library that enforces grammars


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the text: `kind` is "json" (`value` is a JSON Schema), "regex", or unknown.

    Of kind "rule" `value` is one as `engine/grammar/rule_source.py` describes them. With `or_text`
    a text that does not begin with a brace is not constrained. `lead` is a rule for what comes
    before all that, such as the model's reasoning. With `other` the text may fit that constraint
    instead, as long as it cannot begin with one of the `beginnings` of what this one allows.
    `num_levels` are the levels of a schema that are not the caller's own, `places` the pointers to
    what is, each with the name that the caller knows it by.
    """

    kind: str
    value: Any
    or_text: bool = False
    lead: Any = None
    other: Grammar | None = None
    beginnings: tuple[str, ...] = ()
    num_levels: int = 0
    places: tuple[tuple[str, str], ...] = ()

    def named(self, text: str) -> str:
        """A text about the constraint, with places as the caller knows them."""
        for pointer, name in self.places:
            text = re.sub(f"{re.escape(pointer)}(?=[/,. ]|$)", name.replace("\\", r"\\"), text)
        return text
