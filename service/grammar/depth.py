"""How deep schemas may be nested: in grammars, response formats and tools alike."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100  # of objects and lists; the library accepts 124 with all that is put around one


def is_deeper(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether objects and lists are nested deeper than that."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return bool(level)
