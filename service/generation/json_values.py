"""How many values a JSON text has, counted without reading it as JSON.

Reading makes an object of every value, which takes much longer than this. For a text that is no
JSON the count is some number, and reading it says what is wrong.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_QUOTE = ord('"')
_COMMA, _OPENING, _CLOSING = 1, 2, 3  # kinds of bytes; all others are 0
_NAME = re.compile(rb'\s*"([^"\\]{1,64})"\s*:')


def _kinds() -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    table[list(b",")] = _COMMA
    table[list(b"[{")] = _OPENING
    table[list(b"]}")] = _CLOSING
    return table


_KINDS = _kinds()


def count_values(data: bytes) -> int:
    """The number of values: texts, numbers, booleans, nulls, lists and objects.

    An empty list or object counts as two.
    """
    _, kinds = _structure(_without_escapes(data))
    return 1 + int(np.count_nonzero(kinds != _CLOSING))


def nesting(data: bytes) -> int:
    """How many lists and objects lie in each other at the deepest place."""
    _, kinds = _structure(_without_escapes(data))
    return int(np.cumsum(_STEPS[kinds], dtype=np.int32).max(initial=0))


def most_values(data: bytes) -> str | None:
    """The name of that member of an object which has most of its values."""
    text = _without_escapes(data)
    places, kinds = _structure(text)
    # Each comma, and each bracket that opens, has a value after it.
    depth = np.cumsum(_STEPS[kinds], dtype=np.int32)
    begins = np.flatnonzero((depth == 1) & (kinds != _CLOSING))
    if not len(begins):
        return None
    counts = np.add.reduceat((kinds != _CLOSING).astype(np.int32), begins)
    found = _NAME.match(text, int(places[begins[counts.argmax()]]) + 1)
    return found[1].decode(errors="replace") if found else None


_STEPS = np.array([0, 0, 1, -1], np.int8)  # into lists and objects and out of them, by kind


def _structure(text: bytes) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
    """The places and kinds of all commas and brackets that are in no text."""
    raw = np.frombuffer(text, np.uint8)
    kinds = _KINDS[raw]
    kinds[np.bitwise_xor.accumulate(raw == _QUOTE)] = 0  # after an odd number of quotes
    places = np.flatnonzero(kinds)
    return places, kinds[places]


def _without_escapes(data: bytes) -> bytes:
    """A text with as many values, in which every quote begins or ends a text."""
    if b"\\" not in data:
        return data
    return data.replace(b"\\\\", b"").replace(b'\\"', b"")
