"""The `http` field of a reply, framed by hand.

Every reply has it as field 15, and it is all that a REST reply carries. Building message objects
for it takes longer than the token it brings took to render, so the bytes are put together here; a
test compares them with the generated classes.
"""

from __future__ import annotations

_REPLY_HTTP = b"\x7a"  # field 15, length-delimited
_CONTENT_TYPE = b"\x0a"  # field 1 of google.api.HttpBody, length-delimited
_DATA = b"\x12"  # field 2 of google.api.HttpBody, length-delimited


def reply(content_type: str, data: bytes) -> bytes:
    """A serialised reply with nothing but `http`."""
    body = body_message(content_type, data)
    return _REPLY_HTTP + _varint(len(body)) + body


def body_message(content_type: str, data: bytes) -> bytes:
    """A serialised google.api.HttpBody."""
    name = content_type.encode()
    parts = _CONTENT_TYPE + _varint(len(name)) + name
    return parts + _DATA + _varint(len(data)) + data if data else parts


def _varint(value: int) -> bytes:
    """A length in protobuf's base-128 form."""
    if value < 0x80:
        return bytes((value,))
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
