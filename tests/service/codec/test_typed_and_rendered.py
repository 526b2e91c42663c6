"""Typed messages and rendered JSON of the same result have the same content."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import betterproto2
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.config import RankMemory
from service.codec import convert, framing, render, whole
from service.generation.float32 import shortest_float32
from service.generation.generation import Generation, PrefillToken, Token, TokenEvent
from service.openai.chat_answer import ChatAnswer, ChatDelta
from service.openai.completions import CompletionAnswer, CompletionDelta
from service.openai.tool_calls import ToolCall, ToolCallDelta
from service.openai.usage import Usage
from service.pb.tokenwire import v1 as pb
from service.text.tokenizer import TokenSpan
from tests.service.codec.agreement import assert_agree
from tests.service.fakes import ANSWER_HEAD, SERVER, generation, generation_request

FLOATS = st.none() | st.floats(max_value=0, width=32, allow_nan=False, allow_infinity=False).map(
    shortest_float32
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
TOKENS = st.builds(Token, st.integers(0, 2**20), TEXTS, FLOATS, st.booleans())
PREFILL = st.builds(PrefillToken, st.integers(0, 2**20), TEXTS, FLOATS)
SEEDS = st.none() | st.integers(0, 2**64 - 1)
REASONS = st.sampled_from(["length", "eos_token", "stop_sequence"])
WORDS = {None: None, "length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@st.composite
def generations(draw: st.DrawFn, *, losers: int = 1) -> Generation:
    request = generation_request(
        details=draw(st.booleans()),
        decoder_input_details=draw(st.booleans()),
        return_full_text=draw(st.booleans()),
    )
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=3))
    with_top = draw(st.booleans())
    return generation(
        request=request,
        text=draw(TEXTS),
        finish_reason=draw(REASONS),
        tokens=tokens,
        top_tokens=[draw(st.lists(TOKENS, max_size=2)) for _ in tokens] if with_top else [],
        prefill=draw(st.lists(PREFILL, max_size=2)),
        seed=draw(SEEDS),
        best_of_sequences=draw(st.lists(generations(losers=0), max_size=2)) if losers else [],
    )


def assert_exact_reason(choice: Any, exact: str | None) -> None:
    """Why an answer ended is OpenAI's word as text, and exact as an enum."""
    assert choice.reason.name.lower() == (exact or "unspecified")
    assert (choice.finish_reason or None) == WORDS[exact]


def over_the_wire(message: betterproto2.Message) -> Any:
    return type(message).parse(bytes(message))


@given(generations())
def test_typed_and_rendered_texts_agree(result: Generation) -> None:
    typed = over_the_wire(convert.generate_response(result))
    assert_agree(typed, json.loads(render.generation(result)))


@given(st.integers(1, 2**31), TOKENS, st.lists(TOKENS, max_size=2), st.none() | generations())
def test_typed_and_rendered_token_events_agree(
    index: int, token: Token, top_tokens: list[Token], result: Generation | None
) -> None:
    event = TokenEvent(token, top_tokens, result, index)
    typed = over_the_wire(convert.stream_response(event))
    assert_agree(typed, json.loads(render.token_event(event)))


LOGPROBS = st.none() | st.lists(st.tuples(TOKENS, st.lists(TOKENS, max_size=2)), max_size=3)


@given(TEXTS, REASONS, LOGPROBS, st.integers(0, 2**31 - 1))
def test_typed_and_rendered_chat_answers_agree(
    text: str, reason: str, logprobs: Any, count: int
) -> None:
    answer = ChatAnswer(
        head=ANSWER_HEAD,
        text=text,
        finish_reason=reason,
        logprobs=logprobs,
        usage=Usage(count, count),
    )
    typed = over_the_wire(convert.chat_completion([answer]))
    assert_agree(typed, json.loads(render.chat_completion([answer])))
    assert_exact_reason(typed.choices[0], reason)


@given(TEXTS, st.none() | REASONS, LOGPROBS)
def test_typed_and_rendered_chat_deltas_agree(text: str, reason: str | None, logprobs: Any) -> None:
    delta = ChatDelta(
        head=replace(ANSWER_HEAD, created=2**33), text=text, finish_reason=reason, logprobs=logprobs
    )
    typed = over_the_wire(convert.chat_chunk(delta))
    assert_agree(typed, json.loads(render.chat_chunk(delta)))
    assert_exact_reason(typed.choices[0], reason)


@given(st.lists(generations(), min_size=1, max_size=3))
def test_typed_and_rendered_completions_agree(results: list[Generation]) -> None:
    answer = CompletionAnswer(head=ANSWER_HEAD, choices=[[item] for item in results])
    typed = over_the_wire(convert.completion(answer))
    assert_agree(typed, json.loads(render.completion(answer)))
    for choice, result in zip(typed.choices, results, strict=True):
        assert_exact_reason(choice, result.finish_reason)


@given(st.integers(0, 3), TEXTS, st.none() | REASONS)
def test_typed_and_rendered_completion_deltas_agree(
    index: int, text: str, reason: str | None
) -> None:
    delta = CompletionDelta(head=ANSWER_HEAD, index=index, text=text, finish_reason=reason)
    typed = over_the_wire(convert.completion_chunk(delta))
    assert_exact_reason(typed.choices[0], reason)
    assert_agree(typed, json.loads(render.completion_chunk(delta)))


CALLS = st.lists(st.builds(ToolCall, name=TEXTS, arguments=TEXTS, id=TEXTS), max_size=3).map(tuple)


@given(TEXTS, TEXTS, CALLS, st.sampled_from(["tgi", "openai"]))
def test_typed_and_rendered_calls_and_reasoning_agree(
    text: str, reasoning: str, calls: tuple[ToolCall, ...], form: Any
) -> None:
    answer = ChatAnswer(
        head=ANSWER_HEAD,
        text=text,
        reasoning=reasoning,
        calls=calls,
        tool_call_format=form,
        finish_reason="eos_token",
        logprobs=None,
        usage=Usage(1, 1),
    )
    typed = over_the_wire(convert.chat_completion([answer])).choices[0].message
    rendered = json.loads(render.chat_completion([answer]))["choices"][0]["message"]
    assert (typed.reasoning_content or "") == rendered.get("reasoning_content", "") == reasoning
    assert (typed.content or "") == (rendered.get("content") or "") == text
    made = [(c.id, c.function.name, c.function.arguments.string_value) for c in typed.tool_calls]
    functions = [(c["id"], c["function"]) for c in rendered.get("tool_calls", [])]
    assert made == [(id_, function["name"], function["arguments"]) for id_, function in functions]
    assert made == [(call.id, call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("form", ["tgi", "openai"])
def test_typed_and_rendered_parts_of_calls_and_reasoning_agree(form: Any) -> None:
    part = partial(
        ChatDelta, head=ANSWER_HEAD, text="", tool_call_format=form, logprobs=None,
        finish_reason=None,
    )  # fmt: skip
    thought = part(reasoning="hm")
    typed = over_the_wire(convert.chat_chunk(thought)).choices[0].delta
    rendered = json.loads(render.chat_chunk(thought))["choices"][0]["delta"]
    assert typed.reasoning_content == rendered["reasoning_content"] == "hm"
    assert (typed.content or "") == rendered["content"] == ""
    for index in (0, 2):
        call = part(call=ToolCallDelta(name="f", arguments="{", index=index), call_id="x")
        (made,) = over_the_wire(convert.chat_chunk(call)).choices[0].delta.tool_calls
        shown = json.loads(render.chat_chunk(call))["choices"][0]["delta"]["tool_calls"]
        shown = shown[0] if form == "openai" else shown
        assert (made.index or 0) == shown["index"] == index
        assert made.id == shown["id"] == "x"
        assert made.function.name == shown["function"]["name"] == "f"


def test_an_answer_that_calls_a_function_may_end_for_that_reason() -> None:
    delta = ChatDelta(head=ANSWER_HEAD, text="", finish_reason="tool_calls", logprobs=None)
    (choice,) = over_the_wire(convert.chat_chunk(delta)).choices
    assert (choice.finish_reason, choice.reason) == ("tool_calls", pb.FinishReason.TOOL_CALLS)


def test_typed_and_rendered_info_agrees() -> None:
    typed = over_the_wire(convert.info_response(SERVER, None))
    assert_agree(typed, json.loads(render.info(SERVER, None)))
    assert typed.max_top_n_tokens == 5


def test_info_has_the_notes_of_the_engine_if_there_are_any() -> None:
    notes = ("40% of the weights are quantised to int8", "texts end early")
    noted = replace(SERVER, engine=replace(SERVER.engine, notes=notes))
    assert over_the_wire(convert.info_response(noted, None)).notes == [*notes]
    assert json.loads(render.info(noted, None))["notes"] == [*notes]
    assert "notes" not in json.loads(render.info(SERVER, None))


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0"), (0.75, "0.75"), (1.0, "1.0"), (1 / 3, "0.33333334"), (326 / 329, "0.99088144")],
)
def test_info_has_the_share_of_replayed_steps_as_soon_as_there_are_steps(
    share: float, text: str
) -> None:
    typed = over_the_wire(convert.info_response(SERVER, share))
    assert typed.replayed_share == np.float32(share)
    assert b'"replayed_share":%b}' % text.encode() in render.info(SERVER, share)
    assert over_the_wire(convert.info_response(SERVER, None)).replayed_share is None
    assert "replayed_share" not in json.loads(render.info(SERVER, None))


@given(
    st.lists(st.builds(TokenSpan, st.integers(0, 99), TEXTS, st.integers(0, 9), st.integers(0, 9)))
)
def test_typed_and_rendered_token_spans_agree(spans: list[TokenSpan]) -> None:
    typed = pb.TokenizeResponse.parse(framing.tokenize_response(spans))
    assert_agree(typed.tokens, json.loads(render.tokens(spans)))


def test_info_has_what_each_rank_keeps_if_there_are_several() -> None:
    ranks = (RankMemory(2**40, 7), RankMemory(2**39, 5))
    divided = replace(SERVER, engine=replace(SERVER.engine, ranks=ranks))
    alone = replace(SERVER, engine=replace(SERVER.engine, ranks=ranks[:1]))
    typed = over_the_wire(convert.info_response(divided, None)).ranks
    assert [(rank.weights_bytes, rank.cache_bytes) for rank in typed] == [*ranks]
    assert over_the_wire(convert.info_response(alone, None)).ranks == []
    rendered = json.loads(render.info(divided, None))["ranks"]
    assert rendered == [rank._asdict() for rank in ranks]
    assert "ranks" not in json.loads(render.info(alone, None))


@given(generations())
def test_hand_framed_answers_equal_those_of_the_generated_classes(result: Generation) -> None:
    assert whole.generate_response(result) == bytes(convert.generate_response(result))


@given(st.integers(1, 2**32), TOKENS)
def test_hand_written_events_equal_those_of_a_dict(number: int, token: Token) -> None:
    body = {
        "index": number,
        "token": token._asdict(),
        "generated_text": None,
        "details": None,
    }
    assert render.token_event(TokenEvent(token, [], number=number)) == orjson.dumps(body)
