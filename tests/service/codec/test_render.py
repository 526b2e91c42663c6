"""The bytes that REST clients get, as golden strings: key order, nulls, numbers, framing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest

from service.codec import render
from service.errors import ErrorKind, ServiceError, overloaded
from service.generation.float32 import shortest_float32
from service.generation.generation import PrefillToken, Token, TokenEvent
from service.openai.chat_answer import ChatAnswer, ChatDelta
from service.openai.completions import CompletionAnswer, CompletionDelta
from service.openai.usage import Usage
from service.text.tokenizer import TokenSpan
from tests.service.fakes import (
    ANSWER_HEAD,
    PREFILL,
    SERVER,
    TOP_TOKENS,
    generation,
    generation_request,
)

TOKENS = (
    b'[{"id":5,"text":" a","logprob":-0.5,"special":false},'
    b'{"id":6,"text":" time","logprob":0.0,"special":false}]'
)
HEAD = (
    b'"id":"chatcmpl-1","created":12,"model":"some/model","system_fingerprint":"2.1.2-dev0-native"'
)
DETAILS = {"request": generation_request(details=True)}
A = Token(5, " a", -0.5, False)
EOS = Token(2, "<eos>", -0.25, True)


def test_a_text_without_details() -> None:
    assert render.generation(generation()) == b'{"generated_text":" a time"}'


def test_a_text_on_the_root_path_is_a_list_of_one() -> None:
    assert render.generation_list(generation()) == b'[{"generated_text":" a time"}]'


def test_a_text_with_its_prompt() -> None:
    result = generation(request=generation_request(return_full_text=True))
    assert render.generation(result) == b'{"generated_text":"Once upon a time"}'


def test_details_of_greedy_generation() -> None:
    assert render.generation(generation(**DETAILS)) == (
        b'{"generated_text":" a time","details":{"finish_reason":"length","generated_tokens":2,'
        b'"seed":null,"prefill":[],"tokens":' + TOKENS + b"}}"
    )


def test_decoder_input_details_include_all_details() -> None:
    request = generation_request(decoder_input_details=True)
    assert render.generation(generation(request=request, prefill=PREFILL)) == (
        b'{"generated_text":" a time","details":{"finish_reason":"length","generated_tokens":2,'
        b'"seed":null,"prefill":[{"id":0,"text":"Once","logprob":null},'
        b'{"id":1,"text":" upon","logprob":-1.5}],"tokens":' + TOKENS + b"}}"
    )


def test_details_with_everything() -> None:
    loser = generation(seed=0, finish_reason="eos_token", top_tokens=TOP_TOKENS)
    plain_loser = generation(**DETAILS, finish_reason="stop_sequence", prefill=PREFILL[:1])
    result = generation(
        **DETAILS,
        seed=2**64 - 1,
        top_tokens=TOP_TOKENS,
        best_of_sequences=[loser, plain_loser],
    )
    top = (
        b'"top_tokens":[[{"id":5,"text":" a","logprob":-0.5,"special":false},'
        b'{"id":2,"text":"<eos>","logprob":null,"special":true}],[]]'
    )
    assert render.generation(result) == (
        b'{"generated_text":" a time","details":{"finish_reason":"length","generated_tokens":2,'
        b'"seed":18446744073709551615,"prefill":[],"tokens":' + TOKENS + b","
        b'"best_of_sequences":['
        b'{"generated_text":" a time","finish_reason":"eos_token","generated_tokens":2,"seed":0,'
        b'"prefill":[],"tokens":' + TOKENS + b"," + top + b"},"
        b'{"generated_text":" a time","finish_reason":"stop_sequence","generated_tokens":2,'
        b'"seed":null,"prefill":[{"id":0,"text":"Once","logprob":null}],"tokens":' + TOKENS + b"}],"
        b"" + top + b"}}"
    )


def test_a_token_of_a_stream_has_nulls() -> None:
    assert render.token_event(TokenEvent(A, [])) == (
        b'{"index":1,"token":{"id":5,"text":" a","logprob":-0.5,"special":false},'
        b'"generated_text":null,"details":null}'
    )


def test_top_tokens_of_a_stream() -> None:
    assert render.token_event(TokenEvent(A, [EOS], number=3)) == (
        b'{"index":3,"token":{"id":5,"text":" a","logprob":-0.5,"special":false},'
        b'"top_tokens":[{"id":2,"text":"<eos>","logprob":-0.25,"special":true}],'
        b'"generated_text":null,"details":null}'
    )


def test_the_last_token_of_a_stream() -> None:
    assert render.token_event(TokenEvent(EOS, [], generation(), 2)) == (
        b'{"index":2,"token":{"id":2,"text":"<eos>","logprob":-0.25,"special":true},'
        b'"generated_text":" a time","details":null}'
    )


@pytest.mark.parametrize(
    ("seed", "text"), [(None, b"null"), (0, b"0"), (2**63, b"9223372036854775808")]
)
def test_the_last_token_of_a_stream_with_details(seed: int | None, text: bytes) -> None:
    result = generation(**DETAILS, seed=seed, finish_reason="stop_sequence")
    assert render.token_event(TokenEvent(EOS, [], result, 2)) == (
        b'{"index":2,"token":{"id":2,"text":"<eos>","logprob":-0.25,"special":true},'
        b'"generated_text":" a time","details":'
        b'{"finish_reason":"stop_sequence","generated_tokens":2,"seed":' + text + b"}}"
    )


@pytest.mark.parametrize(
    ("logprob", "text"),
    [
        (-0.034149169921875, b"-0.03414917"),
        (0.0, b"0.0"),
        (-0.0, b"-0.0"),
        (-1e-7, b"-1e-7"),
        (-9.313226e-10, b"-9.313226e-10"),
        (-0.1, b"-0.1"),
        (-1.0 / 3.0, b"-0.33333334"),
        (-12.0, b"-12.0"),
        (-1e-3, b"-0.001"),
        (-16777216.0, b"-16777216.0"),
        (float("nan"), b"null"),
        (float("-inf"), b"null"),
        (float("inf"), b"null"),
    ],
)
def test_numbers_are_printed_as_rust_prints_them(logprob: float, text: bytes) -> None:
    event = TokenEvent(Token(1, "x", shortest_float32(logprob), False), [])
    assert b'"logprob":' + text + b"," in render.token_event(event)


@pytest.mark.parametrize("count", [512, 513, 2000])
def test_long_lists_are_the_same_in_slices(count: int) -> None:
    tokens = [Token(index, f"é{index}", -0.5, index % 2 == 0) for index in range(count)]
    tops = [[token, token] for token in tokens]
    request = generation_request(details=True)
    result = generation(request=request, tokens=tokens, top_tokens=tops)
    body = render.generation(result)
    assert body == orjson.dumps(orjson.loads(body))
    details = orjson.loads(body)["details"]
    assert details["tokens"] == [token._asdict() for token in tokens]
    assert details["top_tokens"] == [[token._asdict()] * 2 for token in tokens]


def test_text_is_utf8_and_escaped_only_where_json_requires_it() -> None:
    event = TokenEvent(Token(1, 'é😀"\\\n\t\x01/<', None, False), [])
    assert '"text":"é😀\\"\\\\\\n\\t\\u0001/<"'.encode() in render.token_event(event)


def chat_answer(**changes: Any) -> ChatAnswer:
    answer = ChatAnswer(
        head=ANSWER_HEAD,
        text="Hi.",
        finish_reason="eos_token",
        logprobs=None,
        usage=Usage(7, 3),
    )
    return replace(answer, **changes)


def test_a_chat_answer() -> None:
    assert render.chat_completion([chat_answer()]) == (
        b'{"object":"chat.completion",' + HEAD + b',"choices":[{"index":0,'
        b'"message":{"role":"assistant","content":"Hi."},"logprobs":null,'
        b'"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
    )


def test_a_chat_answer_with_logprobs() -> None:
    answer = chat_answer(logprobs=[(A, [A, EOS]), (EOS, [])])
    assert json.loads(render.chat_completion([answer]))["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": " a",
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": " a", "logprob": -0.5},
                    {"token": "<eos>", "logprob": -0.25},
                ],
            },
            {"token": "<eos>", "logprob": -0.25, "top_logprobs": []},
        ]
    }


def test_a_chat_chunk_has_nulls_and_no_usage() -> None:
    delta = ChatDelta(head=ANSWER_HEAD, text=" a", finish_reason=None, logprobs=None)
    assert render.chat_chunk(delta) == (
        b'{"object":"chat.completion.chunk",' + HEAD + b',"choices":[{"index":0,'
        b'"delta":{"role":"assistant","content":" a"},"logprobs":null,"finish_reason":null}]}'
    )


def test_the_last_chat_chunk() -> None:
    delta = ChatDelta(head=ANSWER_HEAD, text="", finish_reason="eos_token", logprobs=[(EOS, [])])
    assert render.chat_chunk(delta) == (
        b'{"object":"chat.completion.chunk",' + HEAD + b',"choices":[{"index":0,'
        b'"delta":{"role":"assistant","content":""},"logprobs":{"content":[{"token":"<eos>",'
        b'"logprob":-0.25,"top_logprobs":[]}]},"finish_reason":"stop"}]}'
    )


def test_a_completion_sums_the_usage() -> None:
    results = [generation(), generation(text="!", finish_reason="eos_token")]
    answer = CompletionAnswer(head=ANSWER_HEAD, choices=[[item] for item in results])
    assert render.completion(answer) == (
        b'{"object":"text_completion",' + HEAD + b',"choices":['
        b'{"index":0,"text":" a time","logprobs":null,"finish_reason":"length"},'
        b'{"index":1,"text":"!","logprobs":null,"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":6,"completion_tokens":4,"total_tokens":10}}'
    )


def test_a_completion_chunk_has_its_own_order_of_keys() -> None:
    delta = CompletionDelta(head=ANSWER_HEAD, index=2, text="<eos>")
    assert render.completion_chunk(delta) == (
        b'{"object":"text_completion","id":"chatcmpl-1","created":12,'
        b'"choices":[{"index":2,"text":"<eos>","logprobs":null,"finish_reason":""}],'
        b'"model":"some/model","system_fingerprint":"2.1.2-dev0-native"}'
    )


@pytest.mark.parametrize(
    ("reason", "word"),
    [("length", b"length"), ("eos_token", b"stop"), ("stop_sequence", b"stop")],
)
def test_the_last_completion_chunk_says_why_it_ended(reason: str, word: bytes) -> None:
    delta = CompletionDelta(head=ANSWER_HEAD, index=0, text="", finish_reason=reason)
    assert b'"finish_reason":"' + word + b'"}' in render.completion_chunk(delta)


def test_info_has_the_order_and_nulls_of_the_contract() -> None:
    assert render.info(SERVER, None) == (
        b'{"model_id":"some/model","model_sha":null,"model_dtype":"torch.float32",'
        b'"model_device_type":"cpu","model_pipeline_tag":null,"max_concurrent_requests":8,'
        b'"max_best_of":2,"max_stop_sequences":4,"max_input_tokens":90,"max_total_tokens":200,'
        b'"waiting_served_ratio":0.3,"max_batch_total_tokens":400,"max_waiting_tokens":20,'
        b'"max_batch_size":null,"validation_workers":2,"max_client_batch_size":4,'
        b'"router":"text-generation-router","version":"2.1.2-dev0","sha":null,"docker_label":null}'
    )


def test_the_fingerprint_names_the_container() -> None:
    assert replace(SERVER, docker_label="v1").system_fingerprint == "2.1.2-dev0-v1"


def test_tokens_are_a_list() -> None:
    spans = [TokenSpan(0, "", 0, 0), TokenSpan(9, "é", 0, 2)]
    assert render.tokens(spans) == (
        '[{"id":0,"text":"","start":0,"stop":0},{"id":9,"text":"é","start":0,"stop":2}]'.encode()
    )
    assert render.tokens([]) == b"[]"


@pytest.mark.parametrize(
    ("failure", "body"),
    [
        (overloaded(), b'{"error":"Model is overloaded","error_type":"overloaded"}'),
        (
            ServiceError(ErrorKind.VALIDATION, '"x" is é'),
            '{"error":"Input validation error: \\"x\\" is é","error_type":"validation"}'.encode(),
        ),
        (
            ServiceError(ErrorKind.GENERATION, "Server error: x"),
            b'{"error":"Request failed during generation: Server error: x",'
            b'"error_type":"generation"}',
        ),
    ],
)
def test_an_error_has_its_text_and_its_type(failure: ServiceError, body: bytes) -> None:
    assert render.error(failure) == body


@pytest.mark.parametrize(
    ("failure", "body"),
    [
        (
            overloaded(),
            {
                "message": "Model is overloaded",
                "type": "rate_limit_error",
                "param": None,
                "code": "rate_limit_exceeded",
            },
        ),
        (
            ServiceError(ErrorKind.VALIDATION, "é", field="top_p"),
            {
                "message": "Input validation error: é",
                "type": "invalid_request_error",
                "param": "top_p",
                "code": "validation",
            },
        ),
        (
            ServiceError(ErrorKind.GENERATION, "x"),
            {
                "message": "Request failed during generation: x",
                "type": "server_error",
                "param": None,
                "code": "generation",
            },
        ),
    ],
)
def test_an_error_of_openai_is_an_object(failure: ServiceError, body: dict[str, Any]) -> None:
    assert json.loads(render.error(failure, "openai")) == {"error": body}


def test_an_event_is_one_line_of_data() -> None:
    event = render.sse(render.token_event(TokenEvent(Token(1, "a\nb\r", None, False), [])))
    assert event.startswith(b'data: {"index":1,')
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event


def test_the_end_of_an_openai_stream() -> None:
    assert render.DONE == b"data: [DONE]\n\n"


def test_a_first_prompt_token_has_no_logprob() -> None:
    request = generation_request(decoder_input_details=True)
    body = json.loads(
        render.generation(generation(request=request, prefill=[PrefillToken(0, "x", None)]))
    )
    assert body["details"]["prefill"] == [{"id": 0, "text": "x", "logprob": None}]
