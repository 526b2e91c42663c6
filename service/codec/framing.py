"""Hot messages as bytes, framed by hand.

Every token of every stream is a message, and so is every token of a tokenised text. Building and
encoding one with the generated classes takes 40-160 us of the interpreter's lock, by hand 2-5 us.
A test compares each function with the generated classes, for any content.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

from ..generation.generation import PrefillToken, Token
from ..openai.chat_answer import ChatDelta
from ..text.tokenizer import TokenSpan

# A tag is (field number << 3) | wire type: 0 a varint, 2 a length and its bytes, 5 four bytes.
_FLOAT = struct.Struct("<f")
_INVOCATION_TAGS = {"generate": b"\x0a", "chat": b"\x12", "completions": b"\x1a"}
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]  # the numbers that take no more
_NUM_TOKENS = 16_384  # whose fields are kept: the most frequent of a large vocabulary, 3 MB


def http_reply(content_type: str, data: bytes) -> bytes:
    """A reply with only `http` set, which is field 15 of every reply."""
    kind = _content_type(content_type)
    if not data:
        return sized(b"\x7a", kind)
    head = b"\x12" + _varint(len(data))
    whole = _varint(len(kind) + len(head) + len(data))
    return b"".join((b"\x7a", whole, kind, head, data))  # one copy: an answer may have megabytes


@lru_cache
def _content_type(content_type: str) -> bytes:
    """The field of a reply's content type, of which there are few."""
    return sized(b"\x0a", content_type.encode())


def stream_response(index: int, token: Token) -> bytes:
    """GenerateStreamResponse with index and token, as for all tokens of a stream but the last."""
    return b"\x08" + _varint(index) + sized(b"\x12", _token(token))


def compat_event(index: int, token: Token) -> bytes:
    """CompatGenerateResponse around `stream_response`."""
    return sized(b"\x12", stream_response(index, token))


def chat_chunk(delta: ChatDelta) -> bytes:
    """ChatResponse with a chunk of text only, as for all tokens of a stream but the last."""
    message = sized(b"\x0a", b"assistant") + sized(b"\x12", delta.text.encode())
    index = b"\x08" + _varint(delta.index) if delta.index else b""
    head = delta.head
    chunk = (
        sized(b"\x0a", head.id.encode())
        + b"\x10"
        + _varint(head.created)
        + sized(b"\x1a", head.model.encode())
        + sized(b"\x22", head.system_fingerprint.encode())
        + sized(b"\x2a", index + sized(b"\x12", message))
    )
    return sized(b"\x12", chunk)


def tokenize_response(spans: list[TokenSpan]) -> bytes:
    """TokenizeResponse."""
    return b"".join(token_parts([spans], None))


def chat_tokenize_response(prompt: str, spans: list[TokenSpan]) -> bytes:
    """ChatTokenizeResponse."""
    return b"".join(token_parts([spans], prompt))


def token_parts(slices: Iterable[list[TokenSpan]], prompt: str | None) -> Iterator[bytes]:
    """TokenizeResponse, or with a prompt ChatTokenizeResponse, part by part: it may be large."""
    if prompt:
        yield sized(b"\x0a", prompt.encode())
    tag = b"\x0a" if prompt is None else b"\x12"
    for spans in slices:
        yield b"".join(sized(tag, _span(span)) for span in spans)


def invocations_response(kind: str, reply: bytes) -> bytes:
    """InvocationsResponse around a reply of another RPC."""
    return sized(_INVOCATION_TAGS[kind], reply)


def tokens(tag: bytes, items: Iterable[Token]) -> bytes:
    """A field of Tokens."""
    return b"".join([sized(tag, _token(item)) for item in items])


def prefill(tag: bytes, items: Iterable[PrefillToken]) -> bytes:
    """A field of PrefillTokens, which have the same fields as tokens that are not special."""
    return tokens(tag, (Token(item.id, item.text, item.logprob, False) for item in items))


def token_lists(tag: bytes, steps: Iterable[Iterable[Token]]) -> bytes:
    """A field of TokenLists."""
    return b"".join([sized(tag, tokens(b"\x0a", step)) for step in steps])


def numbers(tag: bytes, values: Iterable[int]) -> bytes:
    """A field of unsigned numbers, packed; nothing for none."""
    data = b"".join(map(_varint, values))
    return sized(tag, data) if data else b""


def _span(span: TokenSpan) -> bytes:
    """SimpleToken."""
    parts = b""
    if span.token_id:
        parts += b"\x08" + _varint(span.token_id)
    if span.text:
        parts += sized(b"\x12", span.text.encode())
    if span.start:
        parts += b"\x18" + _varint(span.start)
    if span.stop:
        parts += b"\x20" + _varint(span.stop)
    return parts


def _token(token: Token) -> bytes:
    """Token; fields with a default are left out, as the generated classes do."""
    token_id, text, logprob, special = token
    parts = _id_and_text(token_id, text)
    if logprob is not None:
        parts += b"\x1d" + _FLOAT.pack(logprob)
    return parts + b"\x20\x01" if special else parts


@lru_cache(_NUM_TOKENS)
def _id_and_text(token_id: int, text: str) -> bytes:
    """The fields of a token that are the same almost whenever it comes."""
    parts = b""
    if token_id:
        parts += b"\x08" + _varint(token_id)
    if text:
        parts += sized(b"\x12", text.encode())
    return parts


def sized(tag: bytes, data: bytes) -> bytes:
    """A field of bytes, text or a message."""
    size = len(data)
    return tag + (_ONE_BYTE[size] if size < 0x80 else _varint(size)) + data


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
