"""REST streams: their bytes, the order of events, the end, and errors inside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.e2e import shapes
from tests.e2e.stack import ENDLESS, PROMPT, Stack

DONE = "[DONE]"
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "temperature": 0.0}
COMPLETION = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0.0}

# (path, body) of a stream that does not end by itself, for each path.
_OPENAI = {"temperature": 1e6, "seed": 2, "max_tokens": 1000, "stream": True}
ENDLESS_STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": PROMPT, "parameters": ENDLESS}),
    ("/", {"inputs": PROMPT, "parameters": ENDLESS, "stream": True}),
    ("/v1/chat/completions", {"messages": CHAT["messages"], **_OPENAI}),
    ("/v1/completions", {"prompt": PROMPT, **_OPENAI}),
]


@contextmanager
def opened(stack: Stack, path: str, body: dict[str, Any]) -> Iterator[httpx.Response]:
    """Starts a stream."""
    with stack.http.stream("POST", path, json=body) as reply:
        yield reply


def events(reply: httpx.Response) -> list[str]:
    """Reads a stream to its end, checks headers and framing, and returns the payloads."""
    assert reply.status_code == 200, reply.read()
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-compute-type"] == "1-cpu"
    custom = {name for name in reply.headers if name.startswith("x-")}
    assert custom == {
        "x-compute-type",
        "x-compute-characters",
        "x-accel-buffering",
        "x-request-id",
    }
    text = reply.read().decode()
    assert text.endswith("\n\n")
    payloads = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: ")
        assert "\n" not in event
        payloads.append(event.removeprefix("data: "))
    return payloads


def read(stack: Stack, path: str, body: dict[str, Any]) -> list[str]:
    """The payloads of a whole stream."""
    with opened(stack, path, body) as reply:
        return events(reply)


def check_token_events(bodies: list[dict[str, Any]], *, details: bool) -> None:
    """Checks the events of a text: one per token, the last with the text and any details."""
    for index, body in enumerate(bodies, start=1):
        assert list(body) == ["index", "token", "generated_text", "details"]
        assert body["index"] == index
        shapes.check_token(body["token"])
    *others, last = bodies
    assert all(item["generated_text"] is None and item["details"] is None for item in others)
    assert isinstance(last["generated_text"], str)
    if details:
        assert list(last["details"]) == ["finish_reason", "generated_tokens", "seed"]
        assert last["details"]["generated_tokens"] == len(bodies)
    else:
        assert last["details"] is None


@pytest.mark.parametrize("details", [False, True])
def test_generate_stream_equals_the_whole_answer(stack: Stack, details: bool) -> None:
    parameters = {"max_new_tokens": 6, "details": details}
    bodies = [
        json.loads(item)
        for item in read(stack, "/generate_stream", {"inputs": PROMPT, "parameters": parameters})
    ]
    check_token_events(bodies, details=details)
    expected = stack.generate(max_new_tokens=6)
    assert bodies[-1]["generated_text"] == expected["generated_text"]
    assert [body["token"] for body in bodies] == expected["details"]["tokens"]
    if details:
        assert bodies[-1]["details"] == {
            name: expected["details"][name]
            for name in ("finish_reason", "generated_tokens", "seed")
        }


def test_generate_stream_has_the_bytes_of_tgi(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {**ENDLESS, "max_new_tokens": 2}}
    first, last = read(stack, "/generate_stream", body)
    assert first.startswith('{"index":1,"token":{"id":')
    assert first.endswith('"special":false},"generated_text":null,"details":null}')
    assert last.endswith('","details":null}')


def test_generate_stream_with_seed_and_top_tokens(stack: Stack) -> None:
    parameters = {"max_new_tokens": 5, "details": True, "top_n_tokens": 2, "seed": 2**64 - 1}
    parameters |= {"do_sample": True, "temperature": 5.0}
    bodies = [
        json.loads(item)
        for item in read(stack, "/generate_stream", {"inputs": PROMPT, "parameters": parameters})
    ]
    assert all(
        list(body) == ["index", "token", "top_tokens", "generated_text", "details"]
        for body in bodies
    )
    expected = stack.generate(**parameters)
    assert [body["token"] for body in bodies] == expected["details"]["tokens"]
    assert [body["top_tokens"] for body in bodies] == expected["details"]["top_tokens"]
    assert bodies[-1]["details"]["seed"] == 2**64 - 1


def test_generate_stream_returns_the_full_text_when_asked(stack: Stack) -> None:
    parameters = {"max_new_tokens": 3, "return_full_text": True}
    events = read(stack, "/generate_stream", {"inputs": PROMPT, "parameters": parameters})
    text = stack.generate(max_new_tokens=3)["generated_text"]
    assert json.loads(events[-1])["generated_text"] == PROMPT + text


def test_compat_stream_echoes_the_prompt_at_the_end(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}
    compat = [json.loads(item) for item in read(stack, "/", {**body, "stream": True})]
    plain = [json.loads(item) for item in read(stack, "/generate_stream", body)]
    check_token_events(compat, details=False)
    assert compat[-1]["generated_text"] == PROMPT + plain[-1]["generated_text"]
    assert [item["token"] for item in compat] == [item["token"] for item in plain]


@pytest.mark.parametrize("logprobs", [False, True])
def test_chat_stream_equals_the_whole_answer(stack: Stack, logprobs: bool) -> None:
    body = {**CHAT, "logprobs": logprobs}
    *payloads, done = read(stack, "/v1/chat/completions", {**body, "stream": True})
    assert done == DONE
    whole = stack.http.post("/v1/chat/completions", json=body).json()
    chunks = [json.loads(item) for item in payloads]
    for chunk in chunks:
        shapes.check_chat_chunk(chunk, whole["model"], last=chunk is chunks[-1], logprobs=logprobs)
    (choice,) = whole["choices"]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert len(chunks) == whole["usage"]["completion_tokens"]
    if logprobs:
        entries = [entry for part in parts for entry in part["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]


def test_chat_stream_has_no_usage_and_explicit_nulls(stack: Stack) -> None:
    body = {**CHAT, "stream": True, "temperature": 1e6, "seed": 2}
    first, *_ = read(stack, "/v1/chat/completions", body)
    assert first.startswith('{"object":"chat.completion.chunk","id":"chatcmpl-')
    assert first.endswith('"logprobs":null,"finish_reason":null}]}')


def test_completion_stream_equals_the_whole_answer(stack: Stack) -> None:
    *payloads, done = read(stack, "/v1/completions", {**COMPLETION, "stream": True})
    assert done == DONE
    whole = stack.http.post("/v1/completions", json=COMPLETION).json()
    chunks = [json.loads(item) for item in payloads]
    for chunk in chunks:
        shapes.check_completion_chunk(chunk, whole["model"], last=chunk is chunks[-1])
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert len(chunks) == whole["usage"]["completion_tokens"]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text.startswith(whole["choices"][0]["text"])  # followed by the text of a control token


def test_completion_stream_alternates_between_prompts(stack: Stack) -> None:
    # Texts that do not end by themselves, so that all have the same number of tokens.
    body = {**ENDLESS_STREAMS[3][1], "prompt": [PROMPT, "One", "Two"], "max_tokens": 4}
    *payloads, done = read(stack, "/v1/completions", body)
    assert done == DONE
    assert [json.loads(item)["choices"][0]["index"] for item in payloads] == [0, 1, 2] * 4


@pytest.mark.parametrize(("path", "body"), ENDLESS_STREAMS, ids=lambda item: str(item)[:20])
def test_first_event_comes_before_the_last_is_generated(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    with opened(stack, path, body) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: {")
        stack.wait_until_running(1)  # the generation is still in the engine's batch
        assert next(line for line in lines if line).startswith("data: {")
    stack.wait_until_idle()


IN_BAND: list[tuple[str, dict[str, Any], str]] = [
    (
        "/generate_stream",
        {"inputs": PROMPT, "parameters": {"best_of": 2, "do_sample": True}},
        "`best_of` != 1 is not supported when streaming tokens",
    ),
    (
        "/generate_stream",
        {"inputs": PROMPT, "parameters": {"decoder_input_details": True}},
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
    (
        "/generate_stream",
        {"inputs": PROMPT, "parameters": {"temperature": 0.0}},
        "`temperature` must be strictly positive",
    ),
    ("/generate_stream", {"inputs": ""}, "`inputs` cannot be empty"),
    (
        "/",
        {"inputs": PROMPT, "stream": True, "parameters": {"top_p": 1.0}},
        "`top_p` must be > 0.0 and < 1.0",
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "max_tokens": 0},
        "`max_new_tokens` must be strictly positive",
    ),
    (
        "/v1/completions",
        {**COMPLETION, "stream": True, "max_tokens": 0},
        "`max_new_tokens` must be strictly positive",
    ),
]


@pytest.mark.parametrize(("path", "body", "message"), IN_BAND)
def test_invalid_stream_is_200_with_an_error_event(
    stack: Stack, path: str, body: dict[str, Any], message: str
) -> None:
    first, *rest = read(stack, path, body)
    assert json.loads(first) == {
        "error": f"Input validation error: {message}",
        "error_type": "validation",
    }
    assert rest == ([DONE] if path.startswith("/v1/") else [])


def test_failing_prompt_does_not_stop_the_other_prompts(stack: Stack) -> None:
    body = {**ENDLESS_STREAMS[3][1], "prompt": [PROMPT, "", "Two"], "max_tokens": 2}
    *payloads, done = read(stack, "/v1/completions", body)
    assert done == DONE
    bodies = [json.loads(item) for item in payloads]
    shapes.check_error(bodies[1], "validation")
    others = [item["choices"][0]["index"] for item in bodies if "choices" in item]
    assert others == [0, 2, 0, 2]


BEFORE_THE_STREAM: list[tuple[str, dict[str, Any], str]] = [
    ("/generate_stream", {}, "validation"),
    ("/v1/chat/completions", {"stream": True, "messages": []}, "validation"),
    (
        "/v1/chat/completions",
        {"stream": True, "messages": [{"role": "weird", "content": "x"}]},
        "template_error",
    ),
    ("/v1/completions", {"stream": True, "prompt": "a", "suffix": "b"}, "suffix not supported"),
    ("/v1/completions", {"stream": True, "prompt": ["a"] * 5}, "batch size exceeded"),
]


@pytest.mark.parametrize(("path", "body", "error_type"), BEFORE_THE_STREAM)
def test_error_before_the_stream_is_a_status(
    stack: Stack, path: str, body: dict[str, Any], error_type: str
) -> None:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/json"
    shapes.check_error(reply.json(), error_type)
