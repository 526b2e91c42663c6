"""Parameters of a request, as they are typed: name=value, where the value is JSON or a text."""

from __future__ import annotations

import difflib
import json
from typing import Any

NAMES = (
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "max_tokens",
    "min_p",
    "min_tokens",
    "model",
    "parallel_tool_calls",
    "presence_penalty",
    "priority",
    "reasoning_effort",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "tool_choice",
    "tool_prompt",
    "top_p",
)


def read_parameter(text: str) -> tuple[str, Any]:
    """Reads one; the value None means the server's default. What it may be, the server tells.

    Raises:
        ValueError: it has no value, or there is no such parameter.
    """
    name, sign, raw = text.partition("=")
    if not sign:
        raise ValueError(f"must be like temperature=0.7. Given: {text}")
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}"
        raise ValueError(f"unknown parameter {name}; {hint}")
    value = _value(raw)
    return name, [value] if name == "stop" and isinstance(value, str) else value


def _value(raw: str) -> Any:
    if not raw:
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return raw
