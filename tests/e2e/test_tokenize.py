"""Byte offsets of tokens in text beyond ASCII, over REST and gRPC."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack

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
