"""The engine's exceptions.

EngineError
├── ModelLoadError      the model cannot be served: start-up fails
├── AdapterError        an adapter cannot be loaded or unloaded while the engine runs
├── CapacityError       the request can never fit into the KV cache
└── GrammarError        a grammar cannot be compiled, or a sequence cannot go on in it
"""

from __future__ import annotations

import re
from enum import StrEnum

_COUNTS_ERRORS = re.compile(r"\d+ validation errors? for ")  # pydantic's first line


class EngineError(Exception):
    """Base of the engine's errors; `str()` is one line that a user can read."""


class ModelLoadError(EngineError):
    """The model cannot be loaded, or cannot be served correctly."""


class AdapterFault(StrEnum):
    """What is wrong with a request to load or unload an adapter."""

    INVALID = "invalid"  # its files cannot be applied to this model
    MISSING = "missing"  # there is no such directory
    FORBIDDEN = "forbidden"  # its files are not where they may be, or nowhere is
    LOADED = "loaded"  # there is one of this name
    UNKNOWN = "unknown"  # there is none of this name
    TOO_MANY = "too_many"  # there is no room for one more


class AdapterError(EngineError):
    """An adapter cannot be loaded or unloaded.

    Args:
        fault: what is wrong, by its kind.
        message: the same in a line.
    """

    def __init__(self, fault: AdapterFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class CapacityError(EngineError):
    """The request needs more KV cache than there is."""


class GrammarError(EngineError):
    """The source is not a grammar, is too complex, or does not allow a sequence's tokens."""


def unknown_adapter(name: str) -> AdapterError:
    """The error for a name that no adapter has."""
    return AdapterError(AdapterFault.UNKNOWN, f"The adapter `{name}` does not exist")


def no_adapter_directory() -> AdapterError:
    """The error where no adapter can be loaded: the operator has named no place for them."""
    return AdapterError(
        AdapterFault.FORBIDDEN,
        "adapters can be loaded only where the server was started with --lora-adapter-directory",
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something.

    Its type's name where it has no text, and before the text of a KeyError that is only a key. A
    line that ends in a colon, or only counts errors, has the next ones with it.
    """
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [name]
    counts = _COUNTS_ERRORS.match(lines[0]) is not None
    text = " ".join(lines[: 1 + lines[0].endswith(":") + 2 * counts])
    if not isinstance(error, KeyError):
        return text
    key = error.args[0] if error.args else None
    return key if isinstance(key, str) and " " in key else f"{name}: {text}"
