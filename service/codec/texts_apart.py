"""The long texts of a JSON body, read apart from the rest, part by part.

Who reads JSON holds the interpreter's lock to the end of a call: 8 ms for 2 MB of code in a text,
in which every line has escapes. So long texts are cut out of a body and read in parts; marks stand
for them in the rest, and what is made of it gets the texts back.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from ..generation.json_values import quotes
from ..workers.courtesy import give_way, giving_way

_T = TypeVar("_T")
_LONG = 1024  # bytes of a text: reading it in place takes a microsecond
_PART = 64 * 1024  # bytes of a text that are read in one call: a third of a millisecond
_ESCAPE = 6  # the longest one, which is half of a character beyond the first 65,536
_BYTES = 4  # of a character, at most
_LOW_SURROGATE = re.compile(rb"\\u[dD][c-fC-F]")
_NAME_ENDS = re.compile(rb"\s*:")
_TEXT = msgspec.json.Decoder(str)


def cut(data: bytes) -> tuple[bytes, dict[str, str]]:
    """A body without its long texts, and these by the marks that stand for them.

    The body and all its texts are JSON if, and only if, the rest is and nothing is raised. Names of
    members stay where they are.

    Raises:
        ValueError: a text is none.
    """
    mark = secrets.token_hex(8)  # which no caller can guess
    pieces, texts, end = [], {}, 0
    for start, stop in giving_way(_long_texts(data)):
        name = f"{mark}{start}"
        pieces += [data[end:start], name.encode()]
        texts[name] = _text(data, start, stop)
        end = stop
    return b"".join((*pieces, data[end:])), texts


def restored(value: _T, texts: dict[str, str]) -> _T:
    """The same value with its texts in the place of their marks."""
    return cast("_T", _restored(value, texts)) if texts else value


def with_texts(message: str, texts: dict[str, str]) -> str:
    """What is said of a value without its texts, with those that it names."""
    for mark, text in texts.items():
        message = message.replace(mark, text)
    return message


def _restored(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, dict):
        for name, member in value.items():
            value[name] = _restored(member, texts)
    elif isinstance(value, list):
        value[:] = [_restored(item, texts) for item in giving_way(value)]
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            setattr(value, name, _restored(getattr(value, name), texts))
    return value


def _long_texts(data: bytes) -> list[tuple[int, int]]:
    """Where the long texts that are no names begin and end, without their quotes."""
    places = quotes(data)
    texts = places[: len(places) // 2 * 2].reshape(-1, 2)
    long = texts[np.diff(texts)[:, 0] > _LONG].tolist()
    return [(start + 1, stop) for start, stop in long if not _NAME_ENDS.match(data, stop + 1)]


def _text(data: bytes, start: int, stop: int) -> str:
    """What stands between two quotes.

    Raises:
        ValueError: it is no text of JSON.
    """
    parts = []
    while start < stop:
        give_way()
        end = _end_of_part(data, start, stop)
        parts.append(_TEXT.decode(b'"%b"' % data[start:end]))
        start = end
    return "".join(parts)


def _end_of_part(data: bytes, start: int, stop: int) -> int:
    """Where a part ends that begins at a character: before another one, however it is written."""
    if stop - start <= _PART:
        return stop
    part = data[start : start + _PART].replace(b"\\\\", b"  ")
    end = part.find(b"\\", _PART - _ESCAPE)  # of an escape that may go on in the next part
    if end < 0:
        ends = (at for at in range(_PART, _PART - _BYTES, -1) if data[start + at] & 0xC0 != 0x80)
        end = next(ends, _PART)  # what has no end there is no UTF-8
    elif _LOW_SURROGATE.match(part, end):
        end -= _ESCAPE
    return start + end
