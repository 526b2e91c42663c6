"""Definitions of tools, read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Tool = dict[str, Any]


def read_tools(name: str) -> list[Tool]:
    """Reads a JSON list of tools in OpenAI's form. What they may be, the server tells.

    Raises:
        ValueError: the file cannot be read, or has something else.
    """
    try:
        found = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(found, list) or not found or not all(map(tool_name, found)):
        raise ValueError(
            f'{name} must have a list like [{{"type": "function", "function": {{"name": …}}}}]'
        )
    return found


def tool_name(tool: Any) -> str:
    """A tool's name; empty if it is no definition of a tool."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
