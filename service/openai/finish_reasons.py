"""Why an answer ended, in the words that OpenAI's clients know.

Typed clients of OpenAI's endpoints refuse every other word, TGI's `eos_token` among them.
"""

from __future__ import annotations

_WORDS = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}


def finish_word(reason: str) -> str:
    """OpenAI's word for a reason: `stop`, `length` or `tool_calls`."""
    return _WORDS[reason]
