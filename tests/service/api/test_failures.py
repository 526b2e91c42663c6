"""Failures as both callers see them: a status, or an event inside a REST stream."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from service.pb.google.protobuf import Value
from service.pb.tokenwire import v1 as pb
from tests.service.api.harness import (
    INVALID,
    STREAMS,
    TEXT,
    Service,
    assert_same_status,
    chat_request,
    generate_request,
    streamed,
)
from tests.service.fakes import demo_ids, script, speaking, step

TOP_P = "Input validation error: `top_p` must be > 0.0 and < 1.0"
MISSING = "Failed to deserialize the JSON body into the target type: missing field `{}`"
SUFFIX = "Suffix is not supported and can be achieved by preprocessing the prompt."
BATCH = "Number of prompts exceeds the maximum allowed batch size of 4"
UNKNOWN_ROLE = pb.Message(role="nobody", content=Value(string_value="x"))


@pytest.mark.parametrize(
    ("name", "request_", "kind", "text"),
    [
        ("Generate", generate_request({"top_p": 1.0}), "validation", TOP_P),
        (
            "CompatGenerate",
            pb.CompatGenerateRequest(inputs="x", parameters=pb.GenerateParameters(top_p=1.0)),
            "validation",
            TOP_P,
        ),
        ("Chat", chat_request(top_p=1.0), "validation", TOP_P),
        ("Completions", pb.CompletionsRequest(prompt=["x"], top_p=1.0), "validation", TOP_P),
        ("Generate", pb.GenerateRequest(), "validation", MISSING.format("inputs")),
        ("GenerateStream", pb.GenerateRequest(), "validation", MISSING.format("inputs")),
        ("CompatGenerate", pb.CompatGenerateRequest(), "validation", MISSING.format("inputs")),
        ("Tokenize", pb.TokenizeRequest(), "validation", MISSING.format("inputs")),
        ("Chat", pb.ChatRequest(), "validation", MISSING.format("messages")),
        ("Completions", pb.CompletionsRequest(), "validation", MISSING.format("prompt")),
        (
            "Completions",
            pb.CompletionsRequest(prompt=["x"], suffix="", stream=True),
            "suffix not supported",
            SUFFIX,
        ),
        (
            "Completions",
            pb.CompletionsRequest(prompt=["x"] * 5, stream=True),
            "batch size exceeded",
            BATCH,
        ),
        (
            "Chat",
            chat_request(n=4),
            "validation",
            "Input validation error: `n` must be > 0 and <= 3. Given: 4",
        ),
        (
            "Completions",
            pb.CompletionsRequest(prompt=["x"], n=0),
            "validation",
            "Input validation error: `n` must be > 0 and <= 3. Given: 0",
        ),
        (
            "Chat",
            chat_request(presence_penalty=-2.0),
            "validation",
            "Input validation error: `repetition_penalty` must be strictly positive",
        ),
        (
            "Chat",
            pb.ChatRequest(messages=[UNKNOWN_ROLE], stream=True),
            "template_error",
            "Template error: syntax error: Unknown message role: nobody",
        ),
    ],
    ids=str,
)
async def test_a_refusal_has_the_same_status_for_both(
    service: Service, name: str, request_: Any, kind: str, text: str
) -> None:
    native, rest = await service.ask_both(name, request_)
    assert_same_status(native, rest, INVALID, 422, kind, text)
    assert service.client.requests == []


ENDS = {"Chat": ["[DONE]"], "Completions": ["[DONE]"]}


@pytest.mark.parametrize("name", STREAMS)
async def test_a_refused_stream_is_an_event_for_rest_and_a_status_for_grpc(
    service: Service, name: str
) -> None:
    native, rest = await service.ask_both(name, streamed(name, top_p=1.0))
    assert native.failure.code() is INVALID
    assert native.failure.details() == TOP_P
    assert rest.error is None
    assert rest.events == [{"error": TOP_P, "error_type": "validation"}, *ENDS.get(name, [])]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_failed_stream_is_an_event_for_rest_and_a_status_for_grpc(
    service: Service, name: str
) -> None:
    service.use_script(script(step(demo_ids("x")[0]), step(error="bad luck")))
    native, rest = await service.ask_both(name, streamed(name))
    text = "Request failed during generation: Server error: bad luck"
    assert native.failure.code() is grpc.StatusCode.ABORTED
    assert native.failure.details() == text
    assert len(native.replies) == 1
    assert rest.error is None
    assert rest.events[1:] == [{"error": text, "error_type": "generation"}, *ENDS.get(name, [])]


@pytest.mark.parametrize("name", STREAMS)
async def test_a_full_server_refuses_streams(service: Service, name: str) -> None:
    with service.full():
        native, rest = await service.ask_both(name, streamed(name))
    assert native.failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    failure = {"error": "Model is overloaded", "error_type": "overloaded"}
    assert rest.events == [failure, *ENDS.get(name, [])]


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("Generate", generate_request({"top_p": 1.0})),
        ("CompatGenerate", pb.CompatGenerateRequest(inputs="x")),
        ("Chat", chat_request()),
        ("Completions", pb.CompletionsRequest(prompt=["a", "b"])),
    ],
    ids=["Generate", "CompatGenerate", "Chat", "Completions"],
)
async def test_a_full_server_refuses_requests(service: Service, name: str, request_: Any) -> None:
    with service.full():
        native, rest = await service.ask_both(name, request_)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_same_status(native, rest, code, 429, "overloaded", "Model is overloaded")


@pytest.mark.parametrize("name", ["Generate", "Chat", "Completions"])
async def test_a_failure_without_a_stream_is_a_424(service: Service, name: str) -> None:
    service.use_script(script(step(error="bad luck")))
    request = {
        "Generate": generate_request({}),
        "Chat": chat_request(),
        "Completions": pb.CompletionsRequest(prompt=["a", "b"]),
    }[name]
    native, rest = await service.ask_both(name, request)
    text = "Request failed during generation: Server error: bad luck"
    assert_same_status(native, rest, grpc.StatusCode.ABORTED, 424, "generation", text)


async def test_one_prompt_may_fail_while_the_other_continues(service: Service) -> None:
    fails, speaks = script(step(error="bad luck")), speaking(TEXT)
    (first_id,) = demo_ids("a")
    service.use_script(
        lambda request: (fails if first_id in request.prompt_token_ids else speaks)(request)
    )
    request = pb.CompletionsRequest(prompt=["a", "b"], stream=True, max_tokens=2)
    rest = await service.ask("Completions", request, rest=True)
    first, second, third, end = rest.events
    assert first["error_type"] == "generation"
    assert [event["choices"][0]["index"] for event in (second, third)] == [1, 1]
    assert end == "[DONE]"


async def test_a_long_role_is_still_an_invalid_argument(service: Service) -> None:
    message = pb.Message(role="r" * 100_000, content=Value(string_value="x"))
    answer = await service.ask("Chat", pb.ChatRequest(messages=[message]), rest=False)
    assert answer.failure.code() is INVALID


async def test_content_without_a_value_is_an_invalid_argument(service: Service) -> None:
    message = pb.Message(role="user", content=Value())
    answer = await service.ask("Chat", pb.ChatRequest(messages=[message]), rest=False)
    assert answer.failure.code() is INVALID


@pytest.mark.parametrize("name", STREAMS)
async def test_a_defect_inside_a_stream_is_an_event_for_rest_and_a_status_for_grpc(
    service: Service, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It must not look complete, and its text stays inside the server."""
    service.use_script(script(step(demo_ids("x")[0]), RuntimeError("a secret")))
    native, rest = await service.ask_both(name, streamed(name))
    assert native.failure.code() is grpc.StatusCode.INTERNAL
    assert native.failure.details() == "Internal server error"
    assert rest.error is None
    failure = {"error": "Internal server error", "error_type": "internal"}
    assert rest.events[1:] == [failure, *ENDS.get(name, [])]
    assert b"secret" not in rest.body
    assert "a secret" in caplog.text
