"""The fields of a message, found in its bytes, and counted before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from google.protobuf.descriptor import Descriptor

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10


class TooManyFieldsError(Exception):
    """A message has more fields than may be.

    Attributes:
        field: the field of the message itself in which there are more.
    """

    def __init__(self, field: str | None) -> None:
        super().__init__(field)
        self.field = field


def check_fields(data: bytes, descriptor: Descriptor, max_fields: int) -> None:
    """Counts the fields of a message and of all messages in it, no further than to the limit.

    Bytes that are no message are left to the parser: what comes after a fault is not counted,
    because the parser does not get there either.

    Raises:
        TooManyFieldsError: there are more.
    """
    if len(data) <= 2 * max_fields:  # a field has at least two bytes
        return
    try:
        top = _field_beyond(data, descriptor, max_fields)
    except IndexError:  # they end in the middle of a field
        return
    if top is not None:
        field = descriptor.fields_by_number.get(top >> 3)
        raise TooManyFieldsError(None if field is None else field.name)


def top_fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field of a message, not of those in it.

    Args:
        data: what google's parser has taken, and all of whose fields are known.
    """
    start = 0
    while start < len(data):
        tag, end = _varint(data, start)
        if tag & 7 in (_VARINT, _BYTES):
            size, end = _varint(data, end)
            end += size if tag & 7 == _BYTES else 0
        else:
            end += _FIXED_SIZES[tag & 7]
        yield tag >> 3, start, end
        start = end


def _field_beyond(data: bytes, descriptor: Descriptor, max_fields: int) -> int | None:
    """The tag of the field of the outermost message in which the limit is exceeded, if it is.

    Raises:
        IndexError: the bytes end in the middle of a field.
    """
    outer: list[tuple[int, Descriptor]] = []
    end, message, position, top = len(data), descriptor, 0, 0
    for _ in range(max_fields + 1):
        while position >= end:
            if not outer:
                return None
            end, message = outer.pop()
        tag, position = _varint(data, position)
        if not outer:
            top = tag
        kind = tag & 7
        if kind in (_VARINT, _BYTES):
            size, position = _varint(data, position)
            if kind == _VARINT:
                continue
            part = _parts(message).get(tag)
            if part is None:
                position += size
            else:
                outer.append((end, message))
                end, message = min(position + size, end), part
        elif kind in _FIXED_SIZES:
            position += _FIXED_SIZES[kind]
        else:
            return None
    return top


@cache
def _parts(message: Descriptor) -> dict[int, Descriptor]:
    """The messages that a message may contain, by their tags."""
    return {
        field.number << 3 | _BYTES: field.message_type
        for field in message.fields
        if field.message_type is not None
    }


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends.

    Raises:
        IndexError: the bytes end before it does, or it has more than a number can have.
    """
    value = data[position]
    if value < 0x80:
        return value, position + 1
    value &= 0x7F
    for index in range(1, _MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise IndexError
