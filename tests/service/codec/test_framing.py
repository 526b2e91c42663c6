"""Hand-framed bytes are compared with those of the generated classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.rpc import serialise
from service.codec import convert, framing
from service.codec.presenter import TypedPresenter
from service.generation.float32 import shortest_float32
from service.generation.generation import Token, TokenEvent
from service.openai.chat_answer import ChatDelta
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb
from tests.service.fakes import ANSWER_HEAD, generation, generation_request

REPLIES = (
    pb.GenerateResponse,
    pb.GenerateStreamResponse,
    pb.CompatGenerateResponse,
    pb.ChatResponse,
    pb.CompletionsResponse,
    pb.TokenizeResponse,
    pb.InfoResponse,
    pb.HealthResponse,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=150)
FLOATS = st.none() | st.floats(width=32).map(shortest_float32)
TOKENS = st.builds(Token, st.integers(0, 2**32 - 1), TEXTS, FLOATS, st.booleans())
INDEXES = st.integers(1, 2**32 - 1)


def assert_http(content_type: str, data: bytes) -> None:
    body = HttpBody(content_type=content_type, data=data)
    framed = framing.http_reply(content_type, data)
    assert framed == bytes(pb.GenerateStreamResponse(http=body))
    assert pb.GenerateStreamResponse.parse(framed).http == body


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), st.binary(max_size=300))
def test_a_rest_reply_equals_that_of_the_generated_class(content_type: str, data: bytes) -> None:
    assert_http(content_type, data)


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 129, 16383, 16384, 16385, 2**21])
@pytest.mark.parametrize("overhead", [0, *range(18, 31)])
def test_bodies_of_lengths_where_a_varint_grows(length: int, overhead: int) -> None:
    """The overhead moves the outer length across its own bound."""
    assert_http("application/json", b"x" * max(length - overhead, 0))


@pytest.mark.parametrize("length", [1, 127, 128, 16384])
def test_content_types_of_lengths_where_a_varint_grows(length: int) -> None:
    assert_http("t" * length, b"x")


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply.__name__)
def test_http_has_the_same_field_number_in_every_reply(reply: type) -> None:
    parsed = reply.parse(framing.http_reply("text/plain", b"abc"))  # type: ignore[attr-defined]
    assert parsed.http == HttpBody(content_type="text/plain", data=b"abc")


@given(INDEXES, TOKENS)
def test_a_token_equals_that_of_the_generated_classes(index: int, token: Token) -> None:
    event = convert.stream_response(TokenEvent(token, [], number=index))
    assert framing.stream_response(index, token) == bytes(event)
    assert framing.compat_event(index, token) == bytes(pb.CompatGenerateResponse(event=event))


@given(TEXTS, st.integers(1, 2**64 - 1))
def test_a_chunk_equals_that_of_the_generated_classes(text: str, created: int) -> None:
    delta = ChatDelta(
        head=replace(ANSWER_HEAD, created=created), text=text, finish_reason=None, logprobs=None
    )
    assert framing.chat_chunk(delta) == bytes(pb.ChatResponse(chunk=convert.chat_chunk(delta)))


A = Token(5, " a", -0.5, False)
LAST = generation(request=generation_request(details=True), seed=0)
EVENTS = {
    "plain": TokenEvent(A, [], number=3),
    "top tokens": TokenEvent(A, [A], number=3),
    "last": TokenEvent(A, [], LAST, 3),
    "last with top tokens": TokenEvent(A, [A], LAST, 3),
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_hand_framed_tokens_lose_no_field(event: TokenEvent) -> None:
    expected = convert.stream_response(event)
    assert serialise(TypedPresenter().generate_stream(event)) == bytes(expected)
    expected_compat = bytes(pb.CompatGenerateResponse(event=expected))
    assert serialise(TypedPresenter().compat_generate_stream(event)) == expected_compat


DELTA = ChatDelta(head=ANSWER_HEAD, text=" a", finish_reason=None, logprobs=None)
DELTAS = {
    "plain": DELTA,
    "empty": replace(DELTA, text=""),
    "last": replace(DELTA, finish_reason="length"),
    "logprobs": replace(DELTA, logprobs=[(A, [A])]),
    "no logprobs": replace(DELTA, logprobs=[]),
}


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS.keys())
def test_hand_framed_chunks_lose_no_field(delta: ChatDelta) -> None:
    expected = bytes(pb.ChatResponse(chunk=convert.chat_chunk(delta)))
    assert serialise(TypedPresenter().chat_stream(delta)) == expected
