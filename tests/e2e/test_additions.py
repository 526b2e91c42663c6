"""Paths and fields beyond the contract of TGI 2.1.2, which newer clients use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest

from service.api import docs
from tests.e2e import shapes
from tests.e2e.reflection_client import ReflectionClient, as_dict, details
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

MESSAGES = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": PROMPT + " 🙂"},
]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0.0}
COMPLETION: dict[str, Any] = {"prompt": [PROMPT, "One, two,"], "max_tokens": 6, "temperature": 0.0}
GENERATE: dict[str, Any] = {
    "inputs": PROMPT,
    "parameters": {"max_new_tokens": 6, "details": True, "seed": 3, "temperature": 2.0},
}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# A text that does not end by itself; see `stack.ENDLESS`.
ENDLESS = {"temperature": 1e6, "seed": 2}
CHROMIUM = shutil.which("chromium")


def post(stack: Stack, path: str, body: dict[str, Any]) -> httpx.Response:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply


def timeless(reply: httpx.Response) -> str:
    """A body without its time of creation and its id."""
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"id":"\1"', reply.text)
    return re.sub(r'"created":\d+', '"created":0', text)


def events(reply: httpx.Response) -> list[Any]:
    """The JSON of the events of a stream, and `[DONE]` as text."""
    texts = [part.removeprefix("data: ") for part in reply.text.removesuffix("\n\n").split("\n\n")]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def plain(message: Any) -> list[dict[str, Any]]:
    """Typed tokens as the JSON objects of REST."""
    return [
        {"id": item.id, "text": item.text, "start": item.start, "stop": item.stop}
        for item in message
    ]


def test_models_lists_the_served_model(stack: Stack, api: ReflectionClient) -> None:
    reply = stack.http.get("/v1/models")
    name = stack.http.get("/info").json()["model_id"]
    model = {"id": name, "object": "model", "created": 0, "owned_by": name}
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"object": "list", "data": [model]}
    assert list(reply.json()["data"][0]) == list(model)
    message = api.call("ListModels")
    assert message.object == "list"
    (found,) = message.data
    assert (found.id, found.object, found.created, found.owned_by) == (name, "model", 0, name)
    assert not message.HasField("http")


def test_model_is_found_by_its_name(stack: Stack, api: ReflectionClient) -> None:
    (model,) = stack.http.get("/v1/models").json()["data"]
    for name in (model["id"], quote(model["id"], safe="")):
        reply = stack.http.get(f"/v1/models/{name}")
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.json() == model
    message = api.call("GetModel", {"id": model["id"]})
    assert as_dict(message.model) == {key: value for key, value in model.items() if value}
    assert not message.HasField("http")


@pytest.mark.parametrize("name", ["gpt-4o", "org/other", "tokenwire", "tokenwire/demo/x", "a b"])
def test_other_models_do_not_exist(stack: Stack, api: ReflectionClient, name: str) -> None:
    reply = stack.http.get(f"/v1/models/{name}")
    assert reply.status_code == 404
    error = f"The model `{name}` does not exist"
    assert reply.json() == {"error": error, "error_type": "not_found"}
    with pytest.raises(grpc.RpcError) as caught:
        api.call("GetModel", {"id": name})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == error
    assert details(caught.value) == ("not_found", "id")


def test_model_without_a_name_is_not_looked_for(stack: Stack, api: ReflectionClient) -> None:
    assert stack.http.get("/v1/models/").status_code == 404
    with pytest.raises(grpc.RpcError) as caught:
        api.call("GetModel", {})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "missing field `id`"


def test_ping_answers_like_health(stack: Stack) -> None:
    reply = stack.http.get("/ping")
    assert (reply.status_code, reply.content) == (200, b"")
    added = [name for name in reply.headers if name.startswith(("x-", "grpc-"))]
    assert added == ["x-request-id"]


class TestChatTokenize:
    def test_tokens_are_those_of_the_templated_text(self, stack: Stack) -> None:
        reply = post(stack, "/chat_tokenize", CHAT)
        assert reply.headers["content-type"] == "application/json"
        body = reply.json()
        assert list(body) == ["tokenize_response", "templated_text"]
        text = body["templated_text"]
        assert all(item["content"] in text for item in MESSAGES)
        tokens = post(stack, "/tokenize", {"inputs": text}).json()
        # The template writes the beginning-of-text token itself, so /tokenize has it twice here.
        assert [token["id"] for token in tokens[:2]] == [0, 0]
        assert body["tokenize_response"] == tokens[1:]
        assert max(token["stop"] for token in tokens) == len(text.encode())

    def test_grpc_answers_the_same(self, stack: Stack, api: ReflectionClient) -> None:
        body = post(stack, "/chat_tokenize", CHAT).json()
        message = api.call("ChatTokenize", CHAT)
        assert message.templated_text == body["templated_text"]
        assert plain(message.tokenize_response) == body["tokenize_response"]
        assert not message.HasField("http")

    def test_parameters_are_ignored(self, stack: Stack) -> None:
        with_parameters = {
            "messages": MESSAGES,
            "stream": True,
            "max_tokens": 0,
            "temperature": -1,
            "top_p": 5,
        }
        without = post(stack, "/chat_tokenize", {"messages": MESSAGES})
        assert post(stack, "/chat_tokenize", with_parameters).content == without.content


class TestInvocations:
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize(
        ("path", "body"),
        [("/", GENERATE), ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)],
        ids=["generate", "chat", "completions"],
    )
    def test_answer_is_that_of_the_path_that_takes_the_body(
        self, stack: Stack, path: str, body: dict[str, Any], stream: bool
    ) -> None:
        body = {**body, "stream": stream}
        found, expected = post(stack, "/invocations", body), post(stack, path, body)
        assert timeless(found) == timeless(expected)
        assert found.headers["content-type"] == expected.headers["content-type"]
        custom = [
            {name for name in reply.headers if name.startswith("x-")} for reply in (found, expected)
        ]
        assert custom[0] == custom[1] != set()

    def test_single_prompt_need_not_be_a_list(self, stack: Stack) -> None:
        body = {**COMPLETION, "prompt": PROMPT}
        found, expected = (post(stack, p, body) for p in ("/invocations", "/v1/completions"))
        assert timeless(found) == timeless(expected)

    def test_fields_of_the_other_paths_are_ignored(self, stack: Stack) -> None:
        body = {**GENERATE, "max_tokens": 0, "n": 5, "suffix": "x", "messages": [], "prompt": []}
        expected = post(stack, "/invocations", GENERATE)
        assert post(stack, "/invocations", body).content == expected.content

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize(
        ("kind", "method", "body"),
        [
            ("generate", "CompatGenerate", GENERATE),
            ("chat", "Chat", CHAT),
            ("completions", "Completions", COMPLETION),
        ],
        ids=["generate", "chat", "completions"],
    )
    def test_grpc_wraps_the_reply_of_the_rpc_that_takes_the_body(
        self, api: ReflectionClient, kind: str, method: str, body: dict[str, Any], stream: bool
    ) -> None:
        body = {**body, "stream": stream, "request_id": "same"}
        api.collect(method, body)  # a reply tells what it found in the cache: all, from now on
        replies = api.collect("Invocations", body)
        assert {reply.WhichOneof("kind") for reply in replies} == {kind}
        assert not any(reply.HasField("http") for reply in replies)
        found = [as_dict(getattr(reply, kind)) for reply in replies]
        expected = [as_dict(reply) for reply in api.collect(method, body)]
        for item in (*found, *expected):
            for part in item.values():
                part.pop("created", None)
                part.pop("id", None)
        assert found == expected


class TestDocumentation:
    def test_document_is_the_same_everywhere(self, stack: Stack, api: ReflectionClient) -> None:
        for path in ("/openapi.json", "/api-doc/openapi.json"):
            reply = stack.http.get(path)
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "application/json"
            assert reply.content == docs.open_api()
        message = api.call("OpenApi")
        assert (message.content_type, message.data) == ("application/json", docs.open_api())

    @pytest.mark.parametrize(
        ("path", "content_type", "start"),
        [
            ("/docs", "text/html; charset=utf-8", b"<!doctype html>"),
            ("/docs/swagger-ui.css", "text/css", b".swagger-ui"),
            ("/docs/swagger-ui-bundle.js", "text/javascript", b"/*!"),
            ("/docs/favicon-32x32.png", "image/png", b"\x89PNG"),
        ],
    )
    def test_file_is_served_with_its_type(
        self, stack: Stack, path: str, content_type: str, start: bytes
    ) -> None:
        reply = stack.http.get(path)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == content_type
        assert reply.content.startswith(start)
        assert len(reply.content) == int(reply.headers.get("content-length", len(reply.content)))

    def test_page_refers_only_to_files_that_exist(self, stack: Stack) -> None:
        page = stack.http.get("/docs").text
        asked = re.findall(r'(?:src|href|url)[=:] ?"([^"]+)"', page)
        assert len(asked) == 4
        assert all(stack.http.get(path).status_code == 200 for path in asked)

    @pytest.mark.parametrize("path", ["/docs/nope.js", "/docs/swagger-ui.css.map", "/docs?asset=x"])
    def test_other_files_are_a_404(self, stack: Stack, path: str) -> None:
        reply = stack.http.get(path)
        assert reply.status_code == 404
        assert reply.json() == {"error": "Not Found", "error_type": "not_found"}

    def test_grpc_serves_the_same_files(self, stack: Stack, api: ReflectionClient) -> None:
        message = api.call("Docs", {"asset": "swagger-ui.css"})
        assert message.content_type == "text/css"
        assert message.data == stack.http.get("/docs/swagger-ui.css").content
        assert api.call("Docs").data == stack.http.get("/docs").content
        with pytest.raises(grpc.RpcError) as caught:
            api.call("Docs", {"asset": "../service/docs.py"})
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert details(caught.value) == ("not_found", "asset")

    @pytest.mark.skipif(CHROMIUM is None, reason="needs a `chromium` on PATH")
    def test_browser_shows_the_operations(self, stack: Stack, tmp_path: Path) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
        done = subprocess.run(
            [*command, f"{stack.url}/docs"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        assert "<title>Tokenwire</title>" in done.stdout
        assert 'id="operations-Text_Generation_Inference-generate"' in done.stdout
        assert 'id="operations-Tokenwire-invocations"' in done.stdout
        assert 'data-path="/generate"' in done.stdout


class TestUsageInStreams:
    @pytest.mark.parametrize(
        ("path", "body", "kind"),
        [
            ("/v1/chat/completions", CHAT, "chat.completion.chunk"),
            ("/v1/chat/completions", {**CHAT, "logprobs": True}, "chat.completion.chunk"),
            ("/v1/completions", COMPLETION, "text_completion"),
            ("/v1/completions", {**COMPLETION, "prompt": PROMPT}, "text_completion"),
            ("/invocations", CHAT, "chat.completion.chunk"),
        ],
    )
    def test_rest_stream_ends_with_the_usage(
        self, stack: Stack, path: str, body: dict[str, Any], kind: str
    ) -> None:
        whole = post(stack, path, body).json()
        *chunks, last, done = events(post(stack, path, {**body, **USAGE}))
        assert done == "[DONE]"
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
        head = ["object", "id", "created", "model", "system_fingerprint"]
        assert list(last) == [*head, "choices", "usage"]
        shapes.check_head(last, kind, whole["model"])
        shapes.check_usage(last["usage"])
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert len(chunks) == last["usage"]["completion_tokens"]

    @pytest.mark.parametrize(
        ("method", "body", "field"),
        [("Chat", CHAT, "chunk"), ("Completions", COMPLETION, "completion")],
    )
    def test_grpc_stream_ends_with_the_usage(
        self, api: ReflectionClient, method: str, body: dict[str, Any], field: str
    ) -> None:
        (whole,) = api.collect(method, body)
        *replies, last = (getattr(item, field) for item in api.collect(method, {**body, **USAGE}))
        assert all(reply.choices for reply in replies)
        assert not last.choices
        *others, end = (reply.HasField("usage") for reply in replies)
        assert end  # a typed answer's own end tells it, too
        assert others.count(True) == len(whole.completion.choices) - 1
        assert last.model == whole.completion.model
        assert last.usage == whole.completion.usage
        assert len(replies) == last.usage.completion_tokens

    @pytest.mark.parametrize(
        "options", [None, {}, {"include_usage": None}, {"include_usage": False}]
    )
    @pytest.mark.parametrize(
        ("path", "method", "body"),
        [
            ("/v1/chat/completions", "Chat", CHAT),
            ("/v1/completions", "Completions", COMPLETION),
        ],
        ids=["chat", "completions"],
    )
    def test_chunk_of_usage_is_absent_unless_asked_for(
        self,
        stack: Stack,
        direct_api: ReflectionClient,
        path: str,
        method: str,
        body: dict[str, Any],
        options: Any,
    ) -> None:
        body = {**body, "stream": True, "stream_options": options}
        *chunks, done = events(post(stack, path, body))
        assert done == "[DONE]"
        assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
        replies = direct_api.collect(method, body)
        parts = [getattr(reply, "chunk" if method == "Chat" else "completion") for reply in replies]
        assert all(part.choices for part in parts)
        assert len(parts) == len(chunks)
        assert sum(part.HasField("usage") for part in parts) == len(body.get("prompt", [0]))

    def test_failed_prompt_is_not_counted(self, stack: Stack) -> None:
        body = {**COMPLETION, **ENDLESS, **USAGE, "prompt": [PROMPT, ""], "max_tokens": 3}
        *_, last, done = events(post(stack, "/v1/completions", body))
        assert done == "[DONE]"
        alone = {**body, "prompt": [PROMPT], "stream": False}
        assert last["usage"] == post(stack, "/v1/completions", alone).json()["usage"]
        assert last["usage"]["completion_tokens"] == 3

    def test_stream_options_are_ignored_without_a_stream(self, stack: Stack) -> None:
        for path, body in [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]:
            with_options = {**body, "stream_options": {"include_usage": True}}
            assert timeless(post(stack, path, with_options)) == timeless(post(stack, path, body))


class TestMaxCompletionTokens:
    @pytest.mark.parametrize(
        ("limits", "count"),
        [
            ({"max_completion_tokens": 3}, 3),
            ({"max_tokens": 7, "max_completion_tokens": 3}, 3),
            ({"max_tokens": 3, "max_completion_tokens": 7}, 7),
            ({"max_tokens": 100_000, "max_completion_tokens": 2}, 2),
            ({"max_tokens": 3, "max_completion_tokens": None}, 3),
        ],
        ids=str,
    )
    def test_max_completion_tokens_overrides_max_tokens(
        self, stack: Stack, direct_api: ReflectionClient, limits: dict[str, Any], count: int
    ) -> None:
        body = {"messages": MESSAGES, **ENDLESS, **limits}
        reply = post(stack, "/v1/chat/completions", body).json()
        assert reply["usage"]["completion_tokens"] == count
        assert reply["choices"][0]["finish_reason"] == "length"
        (message,) = direct_api.collect("Chat", body)
        assert message.completion.usage.completion_tokens == count
        stream = events(post(stack, "/v1/chat/completions", {**body, **USAGE}))
        assert stream[-2]["usage"]["completion_tokens"] == count
