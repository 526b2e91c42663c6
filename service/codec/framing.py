"""Hot messages as bytes, framed by hand.

Every token of every stream is a message, and so is every token of a tokenised text. Building and
encoding one with the generated classes takes 40-160 us of the interpreter's lock, by hand 2-5 us.
A test compares each function with the generated classes, for any content.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from ..generation.generator import Token
from ..openai.chat import ChatDelta
from ..text.tokenizer import TokenSpan

# A tag is (field number << 3) | wire type: 0 a varint, 2 a length and its bytes, 5 four bytes.
_FLOAT = struct.Struct("<f")
_INVOCATION_TAGS = {"generate": b"\x0a", "chat": b"\x12", "completions": b"\x1a"}
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]  # the numbers that take no more


def http_reply(content_type: str, data: bytes) -> bytes:
    """A reply with only `http` set, which is field 15 of every reply."""
    body = _sized(b"\x0a", content_type.encode())
    if data:
        body += _sized(b"\x12", data)
    return _sized(b"\x7a", body)


def stream_response(index: int, token: Token) -> bytes:
    """GenerateStreamResponse with index and token, as for all tokens of a stream but the last."""
    return b"\x08" + _varint(index) + _sized(b"\x12", _token(token))


def compat_event(index: int, token: Token) -> bytes:
    """CompatGenerateResponse around `stream_response`."""
    return _sized(b"\x12", stream_response(index, token))


def chat_chunk(delta: ChatDelta) -> bytes:
    """ChatResponse with a chunk of text only, as for all tokens of a stream but the last."""
    message = _sized(b"\x0a", b"assistant") + _sized(b"\x12", delta.text.encode())
    index = b"\x08" + _varint(delta.index) if delta.index else b""
    head = delta.head
    chunk = (
        _sized(b"\x0a", head.id.encode())
        + b"\x10"
        + _varint(head.created)
        + _sized(b"\x1a", head.model.encode())
        + _sized(b"\x22", head.system_fingerprint.encode())
        + _sized(b"\x2a", index + _sized(b"\x12", message))
    )
    return _sized(b"\x12", chunk)


def tokenize_response(spans: list[TokenSpan]) -> bytes:
    """TokenizeResponse."""
    return b"".join(token_parts([spans], None))


def chat_tokenize_response(prompt: str, spans: list[TokenSpan]) -> bytes:
    """ChatTokenizeResponse."""
    return b"".join(token_parts([spans], prompt))


def token_parts(slices: Iterable[list[TokenSpan]], prompt: str | None) -> Iterator[bytes]:
    """TokenizeResponse, or with a prompt ChatTokenizeResponse, part by part: it may be large."""
    if prompt:
        yield _sized(b"\x0a", prompt.encode())
    tag = b"\x0a" if prompt is None else b"\x12"
    for spans in slices:
        yield b"".join(_sized(tag, _span(span)) for span in spans)


def invocations_response(kind: str, reply: bytes) -> bytes:
    """InvocationsResponse around a reply of another RPC."""
    return _sized(_INVOCATION_TAGS[kind], reply)


def _span(span: TokenSpan) -> bytes:
    """SimpleToken."""
    parts = b""
    if span.token_id:
        parts += b"\x08" + _varint(span.token_id)
    if span.text:
        parts += _sized(b"\x12", span.text.encode())
    if span.start:
        parts += b"\x18" + _varint(span.start)
    if span.stop:
        parts += b"\x20" + _varint(span.stop)
    return parts


def _token(token: Token) -> bytes:
    """Token; fields with a default are left out, as the generated classes do."""
    parts = b""
    if token.id:
        parts += b"\x08" + _varint(token.id)
    if token.text:
        parts += _sized(b"\x12", token.text.encode())
    if token.logprob is not None:
        parts += b"\x1d" + _FLOAT.pack(token.logprob)
    if token.special:
        parts += b"\x20\x01"
    return parts


def _sized(tag: bytes, data: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return tag + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """An unsigned number in protobuf's base-128 form."""
    if value < 0x80:
        return _ONE_BYTE[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
