"""Every RPC, on the service's own port and through Envoy, and that REST says the same."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.launch.sources import without_settings
from tests.e2e.reflection_client import ReflectionClient, as_dict, details, retry_seconds
from tests.e2e.stack import (
    DEADLINE_S,
    ENDLESS,
    PROMPT,
    SERVICE,
    Stack,
)
from tests.paths import REPOSITORY

GREEDY = {"max_new_tokens": 8, "details": True, "top_n_tokens": 2, "decoder_input_details": True}
SEEDED = {"max_new_tokens": 8, "details": True, "do_sample": True, "temperature": 5.0, "seed": 9}
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.0}
CHAT_SEEDED = {"messages": MESSAGES, "max_tokens": 6, "temperature": 5.0, "seed": 2**63}

FINISH_REASONS = {
    "FINISH_REASON_LENGTH": "length",
    "FINISH_REASON_EOS_TOKEN": "eos_token",
    "FINISH_REASON_STOP_SEQUENCE": "stop_sequence",
}


def float32(value: float | None) -> float | None:
    """JSON has the shortest decimal of a float32, a typed message the float32 itself."""
    return None if value is None else float(np.float32(value))


def token(message: Any) -> dict[str, Any]:
    """A typed Token with what JSON has in it."""
    logprob = message.logprob if message.HasField("logprob") else None
    return {
        "id": message.id,
        "text": message.text,
        "logprob": logprob,
        "special": message.special,
    }


def prefill_token(message: Any) -> dict[str, Any]:
    logprob = message.logprob if message.HasField("logprob") else None
    return {"id": message.id, "text": message.text, "logprob": logprob}


def rounded(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON tokens with float32 log-probabilities."""
    return [{**item, "logprob": float32(item["logprob"])} for item in tokens]


def finish_reason(message: Any) -> str:
    field = message.DESCRIPTOR.fields_by_name["finish_reason"]
    return FINISH_REASONS[field.enum_type.values_by_number[message.finish_reason].name]


def seed(message: Any) -> int | None:
    return message.seed if message.HasField("seed") else None


def check_details(message: Any, body: dict[str, Any]) -> None:
    """A typed Details says what its JSON twin says."""
    assert finish_reason(message) == body["finish_reason"]
    assert message.generated_tokens == body["generated_tokens"]
    assert seed(message) == body["seed"]
    assert [token(item) for item in message.tokens] == rounded(body["tokens"])
    assert [prefill_token(item) for item in message.prefill] == rounded(body["prefill"])
    tops = [[token(item) for item in step.tokens] for step in message.top_tokens]
    assert tops == [rounded(step) for step in body.get("top_tokens", [])]


def rest(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def rest_events(stack: Stack, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    payloads = [event.removeprefix("data: ") for event in reply.text.strip().split("\n\n")]
    return [json.loads(item) for item in payloads if item != "[DONE]"]


def failure(api: ReflectionClient, method: str, fields: dict[str, Any], **options: Any) -> Any:
    """What a call that fails raises, whether it has one reply or many."""
    with pytest.raises(grpc.RpcError) as caught:
        _call_to_the_end(api, method, fields, **options)
    return caught.value


def test_reflection_lists_the_services(api: ReflectionClient) -> None:
    assert api.services() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]


def test_reflection_describes_every_method(api: ReflectionClient) -> None:
    methods = {
        method.name: (method.input_type.name, method.output_type.name, method.server_streaming)
        for method in api.describe().methods
    }
    assert methods == {
        "Generate": ("GenerateRequest", "GenerateResponse", False),
        "GenerateStream": ("GenerateRequest", "GenerateStreamResponse", True),
        "CompatGenerate": ("CompatGenerateRequest", "CompatGenerateResponse", True),
        "Chat": ("ChatRequest", "ChatResponse", True),
        "Completions": ("CompletionsRequest", "CompletionsResponse", True),
        "Invocations": ("InvocationsRequest", "InvocationsResponse", True),
        "Tokenize": ("TokenizeRequest", "TokenizeResponse", False),
        "ChatTokenize": ("ChatRequest", "ChatTokenizeResponse", False),
        "Info": ("InfoRequest", "InfoResponse", False),
        "ListModels": ("ListModelsRequest", "ListModelsResponse", False),
        "Health": ("HealthRequest", "HealthResponse", False),
        "Metrics": ("MetricsRequest", "HttpBody", False),
        "OpenApi": ("OpenApiRequest", "HttpBody", False),
        "Docs": ("DocsRequest", "HttpBody", False),
    }


@pytest.mark.parametrize("service", ["", SERVICE])
def test_standard_health_service_serves(api: ReflectionClient, service: str) -> None:
    request = health_pb2.HealthCheckRequest(service=service)
    reply = health_pb2_grpc.HealthStub(api.channel).Check(request, timeout=DEADLINE_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_standard_health_service_can_be_watched(api: ReflectionClient) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    call = health_pb2_grpc.HealthStub(api.channel).Watch(request, timeout=DEADLINE_S)
    assert next(call).status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


def test_health(api: ReflectionClient) -> None:
    assert as_dict(api.call("Health")) == {}


def test_info_says_what_rest_says(stack: Stack, api: ReflectionClient) -> None:
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


def test_metrics_are_the_exposition(api: ReflectionClient) -> None:
    message = api.call("Metrics")
    assert message.content_type.startswith("text/plain")
    assert b"tgi_request_count" in message.data


def test_tokenize(stack: Stack, api: ReflectionClient) -> None:
    text = "héllo 🙂"
    message = api.call("Tokenize", {"inputs": text})
    found = [
        {"id": item.id, "text": item.text, "start": item.start, "stop": item.stop}
        for item in message.tokens
    ]
    assert found == rest(stack, "/tokenize", {"inputs": text})
    assert not message.HasField("http")


@pytest.mark.parametrize("parameters", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_generate(stack: Stack, api: ReflectionClient, parameters: dict[str, Any]) -> None:
    fields = {"inputs": PROMPT, "parameters": parameters}
    message = api.call("Generate", fields)
    body = rest(stack, "/generate", fields)
    assert message.generated_text == body["generated_text"]
    check_details(message.details, body["details"])
    assert not message.HasField("http")


def test_generate_with_best_of(api: ReflectionClient) -> None:
    parameters = {**SEEDED, "best_of": 2}
    del parameters["seed"]
    message = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
    (loser,) = message.details.best_of_sequences
    assert loser.seed != message.details.seed
    assert loser.generated_tokens == len(loser.tokens) > 0


def test_generate_without_details(api: ReflectionClient) -> None:
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
def test_token_streams(
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
def test_chat(stack: Stack, api: ReflectionClient, fields: dict[str, Any]) -> None:
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
def test_chat_stream(stack: Stack, api: ReflectionClient, fields: dict[str, Any]) -> None:
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


def test_completions(stack: Stack, api: ReflectionClient) -> None:
    fields = {"prompt": [PROMPT, "One, two,"], "max_tokens": 5, "temperature": 0.0}
    (reply,) = api.collect("Completions", fields)
    body = rest(stack, "/v1/completions", fields)
    found = [(item.index, item.text, item.finish_reason) for item in reply.completion.choices]
    assert found == [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]]
    assert as_dict(reply.completion.usage) == body["usage"]


def test_completions_stream(stack: Stack, api: ReflectionClient) -> None:
    fields = {"prompt": [PROMPT, "One, two,"], "max_tokens": 5, "temperature": 0.0, "stream": True}
    replies = api.collect("Completions", fields)
    expected = rest_events(stack, "/v1/completions", fields)
    found = [(c.index, c.text) for reply in replies for c in reply.completion.choices]
    assert found == [(c["index"], c["text"]) for body in expected for c in body["choices"]]


def test_messages_of_a_stream_come_one_by_one(stack: Stack, api: ReflectionClient) -> None:
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


# (method, request, REST path, code, reason, field, HTTP status)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
SAME_ERRORS: list[tuple[str, dict[str, Any], str, str, str | None]] = [
    ("Generate", {}, "/generate", "validation", "inputs"),
    ("Generate", {"inputs": ""}, "/generate", "validation", "inputs"),
    (
        "Generate",
        {"inputs": "a", "parameters": {"temperature": 0.0}},
        "/generate",
        "validation",
        "parameters.temperature",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"max_new_tokens": 100_000}},
        "/generate",
        "validation",
        "parameters.max_new_tokens",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "seed": 1}},
        "/generate",
        "validation",
        "parameters.seed",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"stop": ["x"] * 100}},
        "/generate",
        "validation",
        "parameters.stop",
    ),
    ("Generate", {"inputs": "word " * 100_000}, "/generate", "validation", "inputs"),
    ("GenerateStream", {}, "/generate_stream", "validation", "inputs"),
    (
        "CompatGenerate",
        {"inputs": "a", "parameters": {"top_k": 0}},
        "/",
        "validation",
        "parameters.top_k",
    ),
    ("Tokenize", {}, "/tokenize", "validation", "inputs"),
    ("Chat", {}, "/v1/chat/completions", "validation", "messages"),
    (
        "Chat",
        {"messages": [{"content": "x"}]},
        "/v1/chat/completions",
        "validation",
        "messages[0].role",
    ),
    (
        "Chat",
        {"messages": [{"role": "user", "content": 5}]},
        "/v1/chat/completions",
        "validation",
        "messages[0].content",
    ),
    ("Chat", {"messages": MESSAGES, "n": 2}, "/v1/chat/completions", "validation", "n"),
    (
        "Chat",
        {"messages": [{"role": "weird", "content": "x"}]},
        "/v1/chat/completions",
        "template_error",
        None,
    ),
    ("Completions", {}, "/v1/completions", "validation", "prompt"),
    (
        "Completions",
        {"prompt": ["a"], "suffix": ""},
        "/v1/completions",
        "suffix not supported",
        "suffix",
    ),
    ("Completions", {"prompt": ["a"] * 5}, "/v1/completions", "batch size exceeded", "prompt"),
]


@pytest.mark.parametrize(("method", "fields", "path", "reason", "field"), SAME_ERRORS)
def test_errors_are_the_same_over_both_transports(
    stack: Stack,
    api: ReflectionClient,
    method: str,
    fields: dict[str, Any],
    path: str,
    reason: str,
    field: str | None,
) -> None:
    error = failure(api, method, fields)
    assert error.code() is INVALID
    assert details(error) == (reason, field)
    assert retry_seconds(error) is None
    reply = stack.http.post(path, json=fields)
    assert reply.status_code == 422
    assert reply.json() == {"error": error.details(), "error_type": reason}


@pytest.mark.parametrize(
    ("method", "fields", "path"),
    [
        (
            "GenerateStream",
            {"inputs": "a", "parameters": {"decoder_input_details": True}},
            "/generate_stream",
        ),
        ("Chat", {"messages": MESSAGES, "stream": True, "max_tokens": 0}, "/v1/chat/completions"),
        ("Completions", {"prompt": ["a", ""], "stream": True}, "/v1/completions"),
    ],
)
def test_error_in_a_stream_is_a_status_for_grpc_and_an_event_for_rest(
    stack: Stack, api: ReflectionClient, method: str, fields: dict[str, Any], path: str
) -> None:
    error = failure(api, method, fields)
    assert error.code() is INVALID
    assert details(error)[0] == "validation"
    expected = {"error": error.details(), "error_type": "validation"}
    assert expected in rest_events(stack, path, fields)


def test_broken_bytes_are_an_invalid_argument(api: ReflectionClient) -> None:
    call = api.channel.unary_unary(f"/{SERVICE}/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff\xff", timeout=DEADLINE_S)
    assert caught.value.code() is INVALID
    assert details(caught.value)[0] == "validation"


def test_text_that_is_not_utf8_is_an_invalid_argument(api: ReflectionClient) -> None:
    call = api.channel.unary_unary(f"/{SERVICE}/Tokenize")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\x0a\x02\xff\xfe", timeout=DEADLINE_S)
    assert caught.value.code() is INVALID


@pytest.mark.parametrize("path", [f"/{SERVICE}/Nothing", "/other.Service/Method"])
def test_unknown_method_is_unimplemented(api: ReflectionClient, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        api.channel.unary_unary(path)(b"", timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_message_above_the_limit_is_resource_exhausted(api: ReflectionClient) -> None:
    error = failure(api, "Tokenize", {"inputs": "a" * 5_000_000})
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_caller_cannot_pose_as_the_gateway(stack: Stack) -> None:
    api = ReflectionClient(stack.through_envoy)
    request = api.request("Tokenize", {"inputs": "a"}).SerializeToString()
    call = stack.through_envoy.unary_unary(f"/{SERVICE}/Tokenize")
    metadata = [("x-envoy-original-path", "/tokenize")]
    forged = call(request, timeout=DEADLINE_S, metadata=metadata)
    assert forged == call(request, timeout=DEADLINE_S)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_grpc_web(stack: Stack, direct_api: ReflectionClient, text: bool) -> None:
    fields = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    payload = direct_api.request("Generate", fields).SerializeToString()
    frame = struct.pack(">BI", 0, len(payload)) + payload
    content_type = "application/grpc-web-text+proto" if text else "application/grpc-web+proto"
    reply = stack.http.post(
        f"/{SERVICE}/Generate",
        content=base64.b64encode(frame) if text else frame,
        headers={"content-type": content_type, "accept": content_type, "x-grpc-web": "1"},
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"] == content_type
    data = _decode(reply.content) if text else reply.content
    (kind, message), (last_kind, trailers) = _frames(data)
    assert (kind, last_kind) == (0, 0x80)
    assert b"grpc-status:0" in trailers.replace(b" ", b"")
    expected = direct_api.call("Generate", fields)
    assert message == expected.SerializeToString()


def test_grpc_web_stream(stack: Stack, direct_api: ReflectionClient) -> None:
    fields = {"inputs": PROMPT, "parameters": {**ENDLESS, "max_new_tokens": 3}}
    payload = direct_api.request("GenerateStream", fields).SerializeToString()
    reply = stack.http.post(
        f"/{SERVICE}/GenerateStream",
        content=struct.pack(">BI", 0, len(payload)) + payload,
        headers={"content-type": "application/grpc-web+proto", "x-grpc-web": "1"},
    )
    *messages, (last_kind, trailers) = _frames(reply.content)
    assert last_kind == 0x80
    assert b"grpc-status:0" in trailers.replace(b" ", b"")
    expected = direct_api.collect("GenerateStream", fields)
    assert messages == [(0, message.SerializeToString()) for message in expected]


def test_grpc_web_error(stack: Stack) -> None:
    reply = stack.http.post(
        f"/{SERVICE}/Generate",
        content=struct.pack(">BI", 0, 0),
        headers={"content-type": "application/grpc-web+proto", "x-grpc-web": "1"},
    )
    assert reply.status_code == 200
    status = reply.headers.get("grpc-status")
    if status is None:
        (_, trailers) = _frames(reply.content)[-1]
        assert b"grpc-status:3" in trailers.replace(b" ", b"")
    else:
        assert status == "3"


@pytest.mark.parametrize("flags", [[], ["--chat"]], ids=["generate", "chat"])
def test_example_streams_the_text(stack: Stack, flags: list[str]) -> None:
    command = [sys.executable, "-W", "error", "examples/grpc_client.py", *flags]
    command += ["--address", stack.grpc_address, "--max-new-tokens", "6", PROMPT]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=without_settings(os.environ),
    )
    assert (done.returncode, done.stderr) == (0, "")
    if flags:
        body = rest(stack, "/v1/chat/completions", CHAT)
        text = body["choices"][0]["message"]["content"]
    else:
        text = stack.generate(max_new_tokens=6)["generated_text"]
    assert done.stdout == text + "\n"


def test_example_names_the_error(unused_tcp_port: int) -> None:
    command = [sys.executable, "examples/grpc_client.py", f"--address=127.0.0.1:{unused_tcp_port}"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("UNAVAILABLE: ")
    assert "Traceback" not in done.stderr


def _call_to_the_end(api: ReflectionClient, *arguments: Any, **options: Any) -> None:
    reply = api.call(*arguments, **options)
    if isinstance(reply, grpc.Call):
        list(reply)


def _decode(data: bytes) -> bytes:
    """Base64 whose parts were encoded one by one, each with its own padding."""
    parts = data.replace(b"=", b"= ").replace(b"= =", b"==").split()
    return b"".join(base64.b64decode(part) for part in parts)


def _frames(data: bytes) -> list[tuple[int, bytes]]:
    frames = []
    while data:
        kind, size = struct.unpack(">BI", data[:5])
        frames.append((kind, data[5 : 5 + size]))
        data = data[5 + size :]
    return frames
