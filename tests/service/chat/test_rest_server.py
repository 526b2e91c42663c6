"""What becomes of REST's answers: parts, and errors in one line."""

from __future__ import annotations

import json

import httpx
import pytest

from service.chat.answer import ChatError, Piece
from service.chat.rest_server import RestServer
from service.client.credentials import Credentials
from service.client.target import parse_target


def ask(reply: httpx.Response) -> list[Piece]:
    server = RestServer(
        parse_target("http://fake"), Credentials("secret"), httpx.MockTransport(lambda _: reply)
    )
    return list(server.answer({"messages": []}))


def event(delta: dict[str, str], finish: str | None = None) -> str:
    chunk = {"choices": [{"delta": delta, "finish_reason": finish}]}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def test_reasoning_and_text_are_told_apart() -> None:
    body = event({"reasoning_content": "hm"}) + event({"content": "a\u2028b"}, "stop")
    assert ask(httpx.Response(200, content=f"{body}data: [DONE]\n\n".encode())) == [
        Piece(reasoning="hm"),
        Piece(text="a\u2028b", finish_reason="stop"),
    ]


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (httpx.Response(401, json={"error": "no key", "error_type": "x"}), "no key (401)"),
        (
            httpx.Response(429, json={"error": "full"}, headers={"retry-after": "3"}),
            "full (429); try again in 3 s",
        ),
        (httpx.Response(422, json={"error": {"message": "a\nb"}}), "a b (422)"),
        (httpx.Response(502, text="<html>"), "Bad Gateway (502)"),
        (httpx.Response(200, content=b'data: {"error": "died"}\n\n'), "died"),
    ],
)
def test_errors_are_one_line(reply: httpx.Response, text: str) -> None:
    with pytest.raises(ChatError) as caught:
        ask(reply)
    assert str(caught.value) == text
