"""Adapters over both faces: chosen by name, listed, and refused where they are not served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import PROMPT, Stack, StartError, running
from tests.e2e.typed_messages import rest
from tests.engine.adapters.made import make_adapter
from tests.paths import DEMO_MODEL

_SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear"}
NAMES = ["parrot", "org/poet"]
MODEL = "tokenwire/demo"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "details": True, "ignore_eos": True}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 8,
    "temperature": 0.0,
}
COMPLETION: dict[str, Any] = {"prompt": [PROMPT], "max_tokens": 8, "temperature": 0.0}
RESPONSE: dict[str, Any] = {"input": PROMPT, "max_output_tokens": 8, "temperature": 0.0}
# path, RPC, body
ENDPOINTS = [
    ("/v1/chat/completions", "Chat", CHAT),
    ("/v1/completions", "Completions", COMPLETION),
    ("/v1/responses", "Responses", RESPONSE),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of two adapters."""
    path = tmp_path_factory.mktemp("adapters")
    made = [
        make_adapter(DEMO_MODEL, path / str(seed), seed, **_SETTINGS) for seed in range(len(NAMES))
    ]
    return ",".join(f"{name}={path}" for name, path in zip(NAMES, made, strict=True))


@pytest.fixture(scope="module")
def served(adapters: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log = tmp_path_factory.mktemp("served") / "log"
    with running(log, f"--lora-adapters={adapters}") as stack:
        yield stack


@pytest.fixture(params=["direct", "through_envoy"])
def typed(served: Stack, request: pytest.FixtureRequest) -> ReflectionClient:
    return ReflectionClient(getattr(served, request.param))


def generate(stack: Stack, adapter: str | None, **parameters: Any) -> str:
    parameters = {**GREEDY, "adapter_id": adapter, **parameters}
    reply = rest(stack, "/generate", {"inputs": PROMPT, "parameters": parameters})
    return str(reply["generated_text"])


def text_of(reply: dict[str, Any]) -> str:
    """The text in an answer of one of OpenAI's endpoints."""
    if "output" in reply:
        return str(reply["output"][0]["content"][0]["text"])
    (choice,) = reply["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def test_each_adapter_answers_in_its_own_way(served: Stack, typed: ReflectionClient) -> None:
    texts = [generate(served, name) for name in (None, *NAMES)]
    assert len(set(texts)) == 3
    for name, text in zip((None, *NAMES), texts, strict=True):
        parameters = GREEDY if name is None else {**GREEDY, "adapter_id": name}
        reply = typed.call("Generate", {"inputs": PROMPT, "parameters": parameters})
        assert reply.generated_text == text


@pytest.mark.parametrize(("path", "_", "body"), ENDPOINTS)
def test_a_model_may_be_an_adapter(served: Stack, path: str, _: str, body: dict[str, Any]) -> None:
    replies = {name: rest(served, path, {**body, "model": name}) for name in (MODEL, *NAMES)}
    assert [reply["model"] for reply in replies.values()] == [MODEL, *NAMES]
    assert len({text_of(reply) for reply in replies.values()}) == 3
    for name in ("tgi", ""):
        assert text_of(rest(served, path, {**body, "model": name})) == text_of(replies[MODEL])


def test_models_and_adapters_are_listed(served: Stack, typed: ReflectionClient) -> None:
    listed = served.http.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == [MODEL, *NAMES]
    assert [entry.id for entry in typed.call("ListModels").data] == [MODEL, *NAMES]
    for entry in listed:
        name = entry["id"]
        assert served.http.get(f"/v1/models/{name}").json() == entry
        assert typed.call("GetModel", {"id": name}).model.id == name
    assert served.http.get("/v1/models/nobody").status_code == 404
    assert list(typed.call("Info").adapter_ids) == NAMES
    assert served.http.get("/info").json()["adapter_ids"] == NAMES


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_an_unknown_adapter_is_not_found(served: Stack, path: str) -> None:
    body = {"inputs": PROMPT, "parameters": {**GREEDY, "adapter_id": "nobody"}}
    reply = served.http.post(path, json=body)
    assert reply.status_code == 404
    assert reply.json()["error_type"] == "not_found"
    assert "The adapter `nobody` does not exist" in reply.json()["error"]


@pytest.mark.parametrize(("path", "method", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(
    served: Stack,
    typed: ReflectionClient,
    path: str,
    method: str,
    body: dict[str, Any],
    stream: bool,
) -> None:
    body = {**body, "model": "nobody"}
    reply = served.http.post(path, json={**body, "stream": stream})
    assert reply.status_code == 404
    assert "The adapter `nobody` does not exist" in reply.text
    with pytest.raises(grpc.RpcError) as refused:
        typed.collect(method, body)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_prompt_of_an_unknown_model_has_no_tokens(
    served: Stack, typed: ReflectionClient
) -> None:
    body = {"messages": CHAT["messages"]}
    for name in (MODEL, *NAMES, "tgi", ""):
        assert served.http.post("/chat_tokenize", json={**body, "model": name}).status_code == 200
    reply = served.http.post("/chat_tokenize", json={**body, "model": "nobody"})
    assert reply.status_code == 404
    assert "The adapter `nobody` does not exist" in reply.text
    with pytest.raises(grpc.RpcError) as refused:
        typed.call("ChatTokenize", {**body, "model": "nobody"})
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_text_goes_on_with_its_adapter_after_the_engine_died(served: Stack) -> None:
    parameters = {**GREEDY, "adapter_id": NAMES[0], "max_new_tokens": 400}
    body = {"inputs": PROMPT, "parameters": parameters}
    unbroken = rest(served, "/generate", body)
    with (
        served.losing_engine(),
        served.http.stream("POST", "/generate_stream", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        served.child("engine").kill()
        (*_, last) = (line for line in lines if line)
    assert json.loads(last.removeprefix("data:"))["generated_text"] == unbroken["generated_text"]


def test_by_the_rule_of_tgi_an_unknown_adapter_is_the_model(adapters: str, tmp_path: Path) -> None:
    flags = (f"--lora-adapters={adapters}", "--unknown-adapter=base")
    with running(tmp_path / "log", *flags) as stack:
        assert generate(stack, "nobody") == generate(stack, None)
        assert generate(stack, NAMES[0]) != generate(stack, None)
        replies = [
            rest(stack, "/v1/completions", {**COMPLETION, "model": name})
            for name in ("nobody", MODEL)
        ]
        assert text_of(replies[0]) == text_of(replies[1])


def test_a_server_without_adapters_knows_none(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "nobody"}}
    assert stack.http.post("/generate", json=body).status_code == 404
    assert "adapter_ids" not in stack.http.get("/info").json()


def test_a_broken_adapter_stops_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with (
        pytest.raises(StartError) as failed,
        running(tmp_path / "log", f"--lora-adapters=mine={tmp_path / 'adapter'}"),
    ):
        pass
    assert "adapter mine: " in str(failed.value)
    assert "has no adapter_model.safetensors" in str(failed.value)
    assert "Traceback" not in str(failed.value)
