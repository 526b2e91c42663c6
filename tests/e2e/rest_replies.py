"""Replies of REST that are a single body, and the headers of generations."""

from __future__ import annotations

import re
from typing import Any

import httpx

from tests.e2e.stack import Stack

TIMING_HEADERS = [
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
]
COUNT_HEADERS = [
    "x-compute-characters",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
]
GENERATION_HEADERS = {*TIMING_HEADERS, *COUNT_HEADERS, "x-compute-type", "x-request-id"}


def post(stack: Stack, path: str, body: Any) -> httpx.Response:
    """Sends JSON; the reply must be a 200."""
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply


def custom_headers(reply: httpx.Response) -> set[str]:
    """The names of all headers that begin with x-."""
    return {name for name in reply.headers if name.startswith("x-")}


def check_generation_headers(reply: httpx.Response, *, characters: int) -> None:
    """Checks the headers of a generation whose prompt has this many characters."""
    headers = reply.headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == str(characters)
    for name in TIMING_HEADERS:
        assert float(headers[name]) >= 0
    for name in COUNT_HEADERS:
        assert re.fullmatch(r"\d+", headers[name])
