"""A vocabulary of bytes, in which the library is asked about grammars before any model is there."""

from functools import cache

from llguidance import LLTokenizer


@cache
def byte_tokenizer() -> LLTokenizer:
    """The table of the vocabulary of bytes."""
    return LLTokenizer("byte")
