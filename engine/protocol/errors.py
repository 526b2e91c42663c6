"""The engine's exceptions.

EngineError
├── ModelLoadError      the model cannot be served: start-up fails
├── CapacityError       the request can never fit into the KV cache
└── GrammarError        a grammar cannot be compiled, or a sequence cannot go on in it
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of the engine's errors; `str()` is one line that a user can read."""


class ModelLoadError(EngineError):
    """The model cannot be loaded, or cannot be served correctly."""


class CapacityError(EngineError):
    """The request needs more KV cache than there is."""


class GrammarError(EngineError):
    """The source is not a grammar, is too complex, or does not allow a sequence's tokens."""
