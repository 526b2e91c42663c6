"""Byte offsets of tokens in text beyond ASCII, over REST and gRPC."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack
from tests.e2e.typed_messages import failure

TEXTS = {
    "emoji": "🙂🙃 a🙂b",
    "family": "a 👨\u200d👩\u200d👧\u200d👦 b",  # seven code points, shown as one picture
    "skin and hair": "👩🏽\u200d💻👨🏿\u200d🦰",
    "flags": "🇪🇸🇯🇵 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "keycap and heart": "1️⃣ ❤️\u200d🔥",
    "Chinese": "深度学习是什么？",  # noqa: RUF001
    "Japanese": "ｶﾞ が か\u3099 日本語、です。",
    "Korean": "안녕 \u1112\u1161\u11ab\u1100\u116e\u11a8",  # composed, and in its letters
    "rare ideographs": "𠮷野家 𪚥",
    "Hebrew": "שָׁלוֹם עולם",
    "Arabic": "مرحبا بالعالم ﷺ",
    "both directions": "abc \u202eשלום\u202c 123 \u2067مرحبا\u2069",  # noqa: RUF001
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343 a\u0315\u0300\u05ae\u0300b",
    "Hindi": "नमस्ते दुनिया",
    "Thai": "สวัสดีชาวโลก",
    "invisible": "a\u200bb\u00adc\ufeffd\u2060",
    "edges": "\x00\x7f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
    "line ends": "a\r\nb\u2028c\u0085d",
}


def concatenated(text: str, tokens: list[dict[str, Any]]) -> str:
    """Joins the slices of all tokens; a character that several tokens share counts once."""
    raw, whole = text.encode(), b""
    for token in tokens:
        start, stop = token["start"], token["stop"]
        assert (
            token["text"] == raw[start:stop].decode()
        )  # decoding fails unless the slice is whole characters
        assert start <= len(whole) <= stop
        whole += raw[len(whole) : stop]
    return whole.decode()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_slices_concatenate_to_the_text(stack: Stack, api: ReflectionClient, text: str) -> None:
    reply = stack.http.post("/tokenize", json={"inputs": text})
    assert reply.status_code == 200
    first, *tokens = reply.json()
    assert (first["text"], first["start"], first["stop"]) == ("", 0, 0)
    assert concatenated(text, tokens) == text
    message = api.call("Tokenize", {"inputs": text})
    typed = [
        {"id": item.id, "text": item.text, "start": item.start, "stop": item.stop}
        for item in message.tokens
    ]
    assert typed == [first, *tokens]


def test_tokens_of_ascii_text_share_no_characters(stack: Stack) -> None:
    text = "Several words, and 12345 numbers;\n\tno more."
    _, *tokens = stack.http.post("/tokenize", json={"inputs": text}).json()
    assert "".join(token["text"] for token in tokens) == text
    assert all(a["stop"] == b["start"] for a, b in pairwise(tokens))


def listed(tokens: Any) -> list[tuple[int, str, int, int]]:
    return [(token.id, token.text, token.start, token.stop) for token in tokens]


def test_a_long_list_is_sent_in_parts_to_both_callers(stack: Stack, api: ReflectionClient) -> None:
    text = "a bé " * 8_000
    reply = stack.http.post("/tokenize", json={"inputs": text})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    expected = [
        tuple(token[key] for key in ("id", "text", "start", "stop")) for token in reply.json()
    ]
    parts = [listed(message.tokens) for message in api.collect("TokenizeStream", {"inputs": text})]
    assert len(parts) > 1
    assert [token for part in parts for token in part] == expected
    assert listed(api.call("Tokenize", {"inputs": text}).tokens) == expected


def test_a_long_prompt_is_listed_in_parts_too(stack: Stack, api: ReflectionClient) -> None:
    request = {"messages": [{"role": "user", "content": "a b " * 8_000}]}
    reply = stack.http.post("/chat_tokenize", json=request).json()
    first, *others = api.collect("ChatTokenizeStream", request)
    assert first.templated_text == reply["templated_text"]
    assert not any(message.templated_text for message in others)
    tokens = [token.id for message in (first, *others) for token in message.tokenize_response]
    assert tokens == [token["id"] for token in reply["tokenize_response"]]


def test_one_message_lists_only_so_many_tokens(stack: Stack, api: ReflectionClient) -> None:
    text = "a b " * 160_000
    error = failure(api, "Tokenize", {"inputs": text})
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == (
        "Input validation error: `inputs` has too many tokens: their list must have at most "
        "4194304 bytes. Given: 640000 characters"
    )
    assert len(stack.http.post("/tokenize", json={"inputs": text}).json()) > 300_000
