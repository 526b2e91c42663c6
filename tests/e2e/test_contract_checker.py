"""The checker of replies itself, on replies that no server sent."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.contract import DONE, JSON, SSE, Checker


def made_up(kind: str, *bodies: Any, status: int = 200) -> httpx.Response:
    """A reply with these bodies: events of a stream, or a single body."""
    texts = [body if isinstance(body, str) else json.dumps(body) for body in bodies]
    text = "".join(f"data: {item}\n\n" for item in texts) if kind == SSE else texts[0]
    return httpx.Response(status, headers={"content-type": kind}, text=text)


TOKEN = {"id": 1, "text": "a", "logprob": -0.5, "special": False}
EVENT = {"index": 1, "token": TOKEN, "generated_text": None, "details": None}
USAGE_CHUNK = {
    "object": "chat.completion.chunk",
    "id": "",
    "created": 1,
    "model": "m",
    "system_fingerprint": "f",
    "choices": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def test_correct_reply_is_accepted() -> None:
    checker = Checker()
    checker.check("POST", "/generate_stream", made_up(SSE, EVENT))
    checker.check("POST", "/v1/chat/completions", made_up(SSE, USAGE_CHUNK, DONE))
    assert checker.exercised == {
        "StreamResponse",
        "Token",
        "ChatCompletionChunk",
        "Usage",
    }


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/generate", made_up(JSON, {"error": "x"}, status=422)),
        ("/generate", made_up("text/plain", "x", status=422)),
        ("/generate", made_up(JSON, {})),
        ("/generate", made_up(JSON, {"generated_text": "x", "unknown": 1})),
        ("/generate", made_up(JSON, [{"generated_text": "x"}])),
        ("/", made_up(JSON, {"generated_text": "x"})),
        ("/", made_up(JSON, [])),
        ("/generate_stream", made_up(SSE)),
        ("/generate_stream", made_up(SSE, EVENT, DONE)),
        ("/generate_stream", made_up(SSE, {**EVENT, "index": 1.0})),
        ("/generate_stream", made_up(SSE, {**EVENT, "index": -1})),
        ("/generate_stream", made_up(SSE, {**EVENT, "top_tokens": None})),
        ("/generate_stream", made_up(SSE, {"index": 1, "token": TOKEN})),
        ("/generate_stream", made_up(SSE, {**EVENT, "token": {**TOKEN, "id": 2**32}})),
        ("/generate_stream", made_up(SSE, {**EVENT, "token": {**TOKEN, "logprob": -0.1 / 3}})),
        ("/generate_stream", made_up(SSE, {**EVENT, "details": {"finish_reason": "stop"}})),
        ("/v1/chat/completions", made_up(SSE, USAGE_CHUNK)),
        ("/v1/chat/completions", made_up(SSE, {**USAGE_CHUNK, "object": "text_completion"}, DONE)),
        ("/v1/chat/completions", made_up(SSE, {**USAGE_CHUNK, "usage": None}, DONE)),
        ("/v1/chat/completions", made_up(JSON, USAGE_CHUNK)),
        ("/tokenize", made_up(JSON, [{"id": "1", "text": "a", "start": 0, "stop": 1}])),
    ],
)
def test_wrong_reply_is_refused(path: str, reply: httpx.Response) -> None:
    with pytest.raises(AssertionError):
        Checker().check("POST", path, reply)
