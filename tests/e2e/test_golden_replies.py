"""Whole replies that do not depend on the model, byte for byte as in `golden/*.txt`.

`UPDATE_GOLDEN=1 pytest tests/e2e/test_golden_replies.py` rewrites these files.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.e2e.exchanges import CHAT, COMPLETION, GENERATE_422, GENERATE_424
from tests.e2e.stack import Stack
from tests.golden import check_golden, check_no_others

GOLDEN = Path(__file__).with_name("golden")

RAW: dict[str, tuple[str, str, dict[str, str], bytes]] = {
    # name: method, path, headers, body
    "unknown_path": ("GET", "/nope", {}, b""),
    "wrong_method": ("PUT", "/generate", {}, b""),
    "wrong_content_type": ("POST", "/generate", {"content-type": "text/plain"}, b"{}"),
    "missing_field": ("POST", "/generate", {}, b"{}"),
    "not_json": ("POST", "/generate", {}, b'{"inputs": }'),
    "wrong_type": ("POST", "/generate", {}, b'{"inputs": "a", "parameters": {"seed": -1}}'),
    "invalid": ("POST", "/generate", {}, json.dumps(GENERATE_422).encode()),
    "failed": ("POST", "/generate", {}, json.dumps(GENERATE_424).encode()),
    "suffix": ("POST", "/v1/completions", {}, b'{"prompt": "a", "suffix": "b"}'),
    "batch_size": ("POST", "/v1/completions", {}, b'{"prompt": ["a", "a", "a", "a", "a"]}'),
    "too_large": ("POST", "/generate", {}, b'"' + b"a" * 2_097_152 + b'"'),
    "stream_invalid": ("POST", "/generate_stream", {}, json.dumps(GENERATE_422).encode()),
    "stream_failed": ("POST", "/generate_stream", {}, json.dumps(GENERATE_424).encode()),
    "chat_stream_invalid": (
        "POST",
        "/v1/chat/completions",
        {},
        json.dumps({**CHAT, "stream": True, "top_p": 1.0}).encode(),
    ),
    "completion_stream_invalid": (
        "POST",
        "/v1/completions",
        {},
        json.dumps({**COMPLETION, "stream": True, "top_p": 1.0}).encode(),
    ),
    "health": ("GET", "/health", {}, b""),
    "preflight": (
        "OPTIONS",
        "/generate",
        {"origin": "https://example.org", "access-control-request-method": "POST"},
        b"",
    ),
}
# These depend on the time, the machine, the chat template, and on whether Envoy had read the body
# when it refused the request.
VARYING = {"date", "x-compute-type", "x-compute-characters", "connection"}


def whole(reply: httpx.Response) -> bytes:
    """Status, headers in alphabetical order, and body."""
    headers = sorted((name, value) for name, value in reply.headers.items() if name not in VARYING)
    head = [f"{reply.status_code}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\n".join(head).encode() + reply.content


@pytest.mark.parametrize("name", RAW)
def test_reply_that_does_not_depend_on_the_model_is_golden(stack: Stack, name: str) -> None:
    method, path, headers, content = RAW[name]
    headers = {"x-request-id": "golden", **headers}
    if content:
        headers = {"content-type": "application/json", **headers}
    reply = stack.http.request(method, path, headers=headers, content=content)
    check_golden(GOLDEN / f"{name}.txt", whole(reply))


def test_every_golden_file_has_a_request() -> None:
    check_no_others(GOLDEN, (f"{name}.txt" for name in RAW))
