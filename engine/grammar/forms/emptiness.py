"""Whether a piece of a grammar allows any text at all; asked of the library."""

from __future__ import annotations

from functools import lru_cache

from llguidance import LLMatcher

from ...protocol.errors import GrammarError
from ..byte_tokenizer import byte_tokenizer


@lru_cache(1024)
def is_empty(start: str) -> bool:
    """Whether a rule's body, in Lark, allows no text.

    Raises:
        GrammarError: the library does not know it.
    """
    source = LLMatcher.grammar_from_lark(f"start: {start}\n")
    matcher = LLMatcher(byte_tokenizer(), source, log_level=0)
    if matcher.is_error():
        if "nsatisfiable" in (reason := matcher.get_error()):
            return True
        raise GrammarError(reason)
    return not any(matcher.compute_bitmask())
