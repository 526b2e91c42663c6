"""Formats and patterns of strings."""

from __future__ import annotations

import re

from ...protocol.errors import GrammarError
from .keywords import Schema, items

# Formats that are enforced; others say nothing, as JSON Schema 2020-12 has it.
FORMATS = frozenset(
    ("date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "email", "hostname", "uri")
)
_CLASS = r"\[\^?(?:[^\]\\]|\\.)+\]"
_NOT_ONLY = re.compile(rf"\^\(\?!\^?({_CLASS})\*\$\)(.*)", re.DOTALL)
# What pydantic writes for a Decimal with a number of digits.
_DECIMAL = re.compile(
    r"\^\[\+-\]\?0\*\(\?:\\d\{0,(\d+)\}\|"
    r"\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)\\d(?:\{0,\d+\}|\*)\\\.\\d(\{0,(\d+)\}|\*)0\*\$\)"
)
_MAX_DIGITS = 100


def with_known_strings(schema: Schema, place: str, *, strict_formats: bool) -> Schema:
    """A schema with formats and patterns that can be enforced.

    Raises:
        GrammarError: a format is unknown, and formats are strict.
    """
    kept = dict(schema)
    name = kept.get("format")
    if isinstance(name, str) and name not in FORMATS:
        if strict_formats and _may_be_string(schema):
            raise GrammarError(f'the "format" {name} is unknown, at {place}')
        del kept["format"]
    if isinstance(kept.get("pattern"), str):
        kept.update(_translated(kept))
    return kept


def _may_be_string(schema: Schema) -> bool:
    types = schema.get("type", "string")
    return types == "string" or "string" in items(types)


def _translated(schema: Schema) -> Schema:
    """A pattern without the look-arounds that pydantic writes; equal, or stricter."""
    found = _NOT_ONLY.fullmatch(schema["pattern"])
    if not found:
        return {}
    only, rest = found.groups()
    other = f"[{only[2:]}" if only.startswith("[^") else f"[^{only[1:]}"
    # The text may not consist of these characters alone: it has another one.
    every = [*items(schema.get("allOf")), {"pattern": other}]
    return {"pattern": _decimal(f"^{rest}"), "allOf": every}


def _decimal(pattern: str) -> str:
    """The pattern of a Decimal: at most so many digits, and so many of them after the point."""
    found = _DECIMAL.fullmatch(pattern)
    if not found:
        return pattern
    before, most = int(found[1]), int(found[2]) - 1
    if most > _MAX_DIGITS:
        return pattern
    after = int(found[4]) if found[4] else None
    forms = [rf"\d{{0,{before}}}"]
    if after is not None:
        forms.append(rf"\d{{0,{before}}}\.\d{{0,{min(after, most)}}}0*")
    else:
        forms += [rf"\d{{0,{count}}}\.\d{{0,{most - count}}}0*" for count in range(most + 1)]
    return rf"^[+-]?0*(?:{'|'.join(forms)})$"
