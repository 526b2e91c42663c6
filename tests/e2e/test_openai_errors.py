"""Errors for OpenAI's SDKs, which read an object where TGI's clients read a text."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
BODY: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}
JSON = {"content-type": "application/json"}
OPENAI = {"x-error-format": "openai"}
FAILING_TEMPERATURE = 1e-45  # logits become infinite


@pytest.fixture
def sdk(stack: Stack) -> Any:
    url = f"{stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", timeout=DEADLINE_S, max_retries=0) as client:
        yield client


def error(code: str, message: str, *, param: str | None, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


TOP_P = error(
    "validation",
    "Input validation error: `top_p` must be > 0.0 and < 1.0",
    param="top_p",
    kind="invalid_request_error",
)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_header_asks_for_openais_form(stack: Stack, path: str) -> None:
    body = {**BODY, "prompt": PROMPT, "top_p": 1.0}
    reply = stack.http.post(path, json=body, headers=OPENAI)
    assert (reply.status_code, reply.json()) == (422, TOP_P)
    assert stack.http.post(path, json=body, headers={"x-stainless-os": "x"}).json() == TOP_P
    plain = {"error": TOP_P["error"]["message"], "error_type": "validation"}
    assert stack.http.post(path, json=body).json() == plain
    assert stack.http.post(path, json=body, headers={"x-error-format": "tgi"}).json() == plain


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_error_in_a_stream_has_the_form_too(stack: Stack, path: str) -> None:
    body = {**BODY, "prompt": PROMPT, "top_p": 1.0, "stream": True}
    reply = stack.http.post(path, json=body, headers=OPENAI)
    event, done, _ = reply.text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(event.removeprefix("data: ")) == TOP_P


def test_paths_of_tgi_keep_their_form(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {"top_p": 1.0}}
    for path in ("/generate", "/"):
        reply = stack.http.post(path, json=body, headers={**OPENAI, "x-stainless-lang": "js"})
        assert list(reply.json()) == ["error", "error_type"]


@pytest.mark.parametrize("wanted", ["OpenAI", "json", ""])
def test_other_forms_are_refused(stack: Stack, wanted: str) -> None:
    reply = stack.http.post(CHAT, json=BODY, headers={"x-error-format": wanted})
    assert reply.status_code == 422
    assert "header `x-error-format` must be `tgi` or `openai`" in reply.json()["error"]


def test_broken_json_is_told_in_the_form(stack: Stack) -> None:
    reply = stack.http.post(CHAT, content=b'{"messages": ', headers={**JSON, **OPENAI})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_sdk_raises_what_it_raises_for_openai(sdk: openai.OpenAI) -> None:
    create = sdk.chat.completions.create
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(model="m", messages=MESSAGES, top_p=1.0)
    assert (refused.value.code, refused.value.param) == ("validation", "top_p")
    assert refused.value.type == "invalid_request_error"
    assert refused.value.body == TOP_P["error"]
    assert "`top_p` must be" in refused.value.message
    with pytest.raises(openai.NotFoundError, match="The model `org/x` does not exist") as unknown:
        sdk.models.retrieve("org/x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as failed:
        create(model="m", messages=MESSAGES, temperature=FAILING_TEMPERATURE)
    assert (failed.value.status_code, failed.value.code) == (424, "generation")
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        sdk.embeddings.create(model="m", input="x")


@pytest.mark.parametrize("max_tokens", [1_000_000, 5000])
def test_sdk_learns_that_a_conversation_is_too_long(sdk: openai.OpenAI, max_tokens: int) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        sdk.chat.completions.create(model="m", messages=MESSAGES, max_tokens=max_tokens)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        sdk.completions.create(model="m", prompt="word " * 20_000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


def test_sdk_raises_the_error_of_a_stream(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(model="m", messages=MESSAGES, top_p=1.0, stream=True)
    with pytest.raises(openai.APIError, match="`top_p` must be") as refused:
        list(stream)
    assert (refused.value.code, refused.value.param) == ("validation", "top_p")
