"""Rules, of which a grammar may consist: `engine/grammar/rule_source.py` says what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def schemas_of(rule: Any) -> Iterator[Any]:
    """The schemas in a rule."""
    if isinstance(rule, dict) and "schema" in rule:
        yield rule["schema"]
    elif isinstance(rule, (dict, list)):
        for inner in rule.values() if isinstance(rule, dict) else rule:
            yield from schemas_of(inner)
