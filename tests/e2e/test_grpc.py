"""Every RPC answers what REST answers, on the port of the service and through Envoy."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, as_dict
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, SERVICE, Stack
from tests.e2e.typed_messages import (
    check_details,
    failure,
    finish_reason,
    float32,
    rest,
    rest_events,
    rounded,
    seed,
    token,
)

GREEDY = {"max_new_tokens": 8, "details": True, "top_n_tokens": 2, "decoder_input_details": True}
SEEDED = {"max_new_tokens": 8, "details": True, "do_sample": True, "temperature": 5.0, "seed": 9}
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.0}
CHAT_SEEDED = {"messages": MESSAGES, "max_tokens": 6, "temperature": 5.0, "seed": 2**63}


def test_info_equals_rest(stack: Stack, api: ReflectionClient) -> None:
    message = api.call("Info")
    expected = stack.http.get("/info").json()
    for name, value in expected.items():
        if value is None:
            assert not message.HasField(name)
        elif isinstance(value, float):
            assert getattr(message, name) == float32(value)
        else:
            assert getattr(message, name) == value
    assert message.max_top_n_tokens == 5


def test_metrics_are_prometheus_text(api: ReflectionClient) -> None:
    message = api.call("Metrics")
    assert message.content_type.startswith("text/plain")
    assert b"tgi_request_count" in message.data


def test_tokenize_equals_rest(stack: Stack, api: ReflectionClient) -> None:
    text = "héllo 🙂"
    message = api.call("Tokenize", {"inputs": text})
    found = [
        {"id": item.id, "text": item.text, "start": item.start, "stop": item.stop}
        for item in message.tokens
    ]
    assert found == rest(stack, "/tokenize", {"inputs": text})
    assert not message.HasField("http")


@pytest.mark.parametrize("parameters", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_generate_equals_rest(
    stack: Stack, api: ReflectionClient, parameters: dict[str, Any]
) -> None:
    fields = {"inputs": PROMPT, "parameters": parameters}
    message = api.call("Generate", fields)
    body = rest(stack, "/generate", fields)
    assert message.generated_text == body["generated_text"]
    check_details(message.details, body["details"])
    assert not message.HasField("http")


def test_best_of_returns_the_losing_sequences(api: ReflectionClient) -> None:
    parameters = {**SEEDED, "best_of": 2}
    del parameters["seed"]
    message = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
    (loser,) = message.details.best_of_sequences
    assert loser.seed != message.details.seed
    assert loser.generated_tokens == len(loser.tokens) > 0


def test_details_are_absent_unless_asked_for(api: ReflectionClient) -> None:
    message = api.call("Generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}})
    assert not message.HasField("details")


def test_generate_sends_timings_as_metadata(stack: Stack) -> None:
    for channel in (stack.direct, stack.through_envoy):
        api = ReflectionClient(channel)
        call = channel.unary_unary(f"/{SERVICE}/Generate")
        fields = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}
        request = api.request("Generate", fields).SerializeToString()
        _, state = call.with_call(request, timeout=DEADLINE_S)
        metadata = dict(state.initial_metadata())
        assert metadata["x-compute-characters"] == str(len(PROMPT))
        assert int(metadata["x-generated-tokens"]) in (1, 2)
        assert float(metadata["x-inference-time"]) >= 0


@pytest.mark.parametrize("parameters", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("method", ["GenerateStream", "CompatGenerate"])
def test_token_streams_equal_rest(
    stack: Stack, api: ReflectionClient, method: str, parameters: dict[str, Any]
) -> None:
    parameters = {**parameters, "decoder_input_details": False}
    fields: dict[str, Any] = {"inputs": PROMPT, "parameters": parameters}
    expected = rest_events(stack, "/generate_stream", fields)
    if method == "CompatGenerate":
        fields = {**fields, "stream": True}
        replies = api.collect(method, fields)
        assert all(reply.WhichOneof("kind") == "event" for reply in replies)
        messages = [reply.event for reply in replies]
        expected[-1]["generated_text"] = PROMPT + expected[-1]["generated_text"]
    else:
        messages = api.collect(method, fields)
    assert [message.index for message in messages] == list(range(1, len(messages) + 1))
    for message, body in zip(messages, expected, strict=True):
        assert [token(message.token)] == rounded([body["token"]])
        assert [token(item) for item in message.top_tokens] == rounded(body.get("top_tokens", []))
        assert message.HasField("generated_text") == (body["generated_text"] is not None)
        assert message.HasField("details") == (body["details"] is not None)
    last = messages[-1]
    assert last.generated_text == expected[-1]["generated_text"]
    assert finish_reason(last.details) == expected[-1]["details"]["finish_reason"]
    assert last.details.generated_tokens == len(messages)
    assert seed(last.details) == expected[-1]["details"]["seed"]


def test_compat_generate_without_stream_is_one_message(stack: Stack, api: ReflectionClient) -> None:
    fields = {"inputs": PROMPT, "parameters": GREEDY}
    (reply,) = api.collect("CompatGenerate", fields)
    (body,) = rest(stack, "/", fields)
    assert reply.WhichOneof("kind") == "response"
    assert reply.response.generated_text == body["generated_text"]
    check_details(reply.response.details, body["details"])


@pytest.mark.parametrize("fields", [CHAT, CHAT_SEEDED], ids=["greedy", "seeded"])
def test_chat_equals_rest(stack: Stack, api: ReflectionClient, fields: dict[str, Any]) -> None:
    fields = {**fields, "logprobs": True, "top_logprobs": 2}
    (reply,) = api.collect("Chat", fields)
    body = rest(stack, "/v1/chat/completions", fields)
    assert reply.WhichOneof("kind") == "completion"
    message, (choice,) = reply.completion, body["choices"]
    assert (message.model, message.system_fingerprint) == (
        body["model"],
        body["system_fingerprint"],
    )
    assert as_dict(message.usage) == body["usage"]
    (answer,) = message.choices
    assert answer.message.role == "assistant"
    assert answer.message.content == choice["message"]["content"]
    assert answer.finish_reason == choice["finish_reason"]
    found = [(item.token, item.logprob) for item in answer.logprobs.content]
    entries = choice["logprobs"]["content"]
    assert found == [(item["token"], float32(item["logprob"])) for item in entries]
    tops = [[top.token for top in item.top_logprobs] for item in answer.logprobs.content]
    assert tops == [[top["token"] for top in item["top_logprobs"]] for item in entries]


@pytest.mark.parametrize("fields", [CHAT, CHAT_SEEDED], ids=["greedy", "seeded"])
def test_chat_stream_equals_rest(
    stack: Stack, api: ReflectionClient, fields: dict[str, Any]
) -> None:
    fields = {**fields, "stream": True}
    replies = api.collect("Chat", fields)
    expected = rest_events(stack, "/v1/chat/completions", fields)
    assert all(reply.WhichOneof("kind") == "chunk" for reply in replies)
    for reply, body in zip(replies, expected, strict=True):
        (part,), (choice,) = reply.chunk.choices, body["choices"]
        assert part.delta.content == choice["delta"]["content"]
        assert part.delta.role == "assistant"
        assert (part.finish_reason or None) == choice["finish_reason"]
        assert not part.HasField("logprobs")


def test_completions_equal_rest(stack: Stack, api: ReflectionClient) -> None:
    fields = {"prompt": [PROMPT, "One, two,"], "max_tokens": 5, "temperature": 0.0}
    (reply,) = api.collect("Completions", fields)
    body = rest(stack, "/v1/completions", fields)
    found = [(item.index, item.text, item.finish_reason) for item in reply.completion.choices]
    assert found == [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]]
    assert as_dict(reply.completion.usage) == body["usage"]


def test_completions_stream_equals_rest(stack: Stack, api: ReflectionClient) -> None:
    fields = {"prompt": [PROMPT, "One, two,"], "max_tokens": 5, "temperature": 0.0, "stream": True}
    replies = api.collect("Completions", fields)
    expected = rest_events(stack, "/v1/completions", fields)
    found = [(c.index, c.text) for reply in replies for c in reply.completion.choices]
    assert found == [(c["index"], c["text"]) for body in expected for c in body["choices"]]


def test_messages_of_a_stream_arrive_one_by_one(stack: Stack, api: ReflectionClient) -> None:
    call = api.call("GenerateStream", {"inputs": PROMPT, "parameters": ENDLESS})
    assert next(call).index == 1
    stack.wait_until_running(1)  # the generation is still in the engine's batch
    assert next(call).index == 2
    call.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    stack.wait_until_idle()


def test_deadline_ends_a_call_and_frees_its_blocks(stack: Stack, api: ReflectionClient) -> None:
    for method in ("Generate", "GenerateStream"):
        fields = {"inputs": PROMPT, "parameters": ENDLESS}
        error = failure(api, method, fields, timeout=0.2)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stack.wait_until_idle()


def test_caller_cannot_forge_the_headers_of_envoy(stack: Stack) -> None:
    api = ReflectionClient(stack.through_envoy)
    request = api.request("Tokenize", {"inputs": "a"}).SerializeToString()
    call = stack.through_envoy.unary_unary(f"/{SERVICE}/Tokenize")
    metadata = [("x-envoy-original-path", "/tokenize")]
    forged = call(request, timeout=DEADLINE_S, metadata=metadata)
    assert forged == call(request, timeout=DEADLINE_S)
