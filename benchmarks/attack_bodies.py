"""Requests that are legal, or nearly, and that cost a server far more than their caller.

Each is a path and a JSON body of at most 2 MB, which `size` scales down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FULL_BYTES = 2_000_000
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@dataclass(frozen=True, slots=True)
class Attack:
    """A request, and how often it is sent at a time.

    Attributes:
        name: what is unusual about it.
        path: where it is sent to.
        body: makes it, of about so many bytes.
        count: how many callers send it at the same time.
        share: of the size that is asked for.
    """

    name: str
    path: str
    body: Callable[[int], bytes]
    count: int = 6
    share: float = 1.0

    def make(self, size: int = FULL_BYTES) -> bytes:
        """The body."""
        return self.body(int(size * self.share))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _inputs(text: str) -> Callable[[int], bytes]:
    """One text, repeated."""
    width = len(text.encode())
    return lambda size: _json({"inputs": text * (size // width)})


def _chat(make: Callable[[int], dict[str, Any]]) -> Callable[[int], bytes]:
    return lambda size: _json({"messages": [USER], "max_tokens": 1, **make(size)})


def _members(size: int) -> dict[str, int]:
    return {f"key{index}": 1 for index in range(size // 14)}


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    made = {"role": "assistant", "tool_calls": [{"id": "0", "function": function}]}
    return {"messages": [USER, made]}


def _tool(index: int, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{index}", "parameters": parameters}}


def _nested(size: int) -> Any:
    """Deep and wide: twenty levels of objects, each with members of its own."""
    value: Any = {}
    for level in range(20):
        value = {"properties": {**_members(size // 20), f"level{level}": value}}
    return value


def _texts(size: int) -> str:
    """A JSON text of many keys, escaped once more when it is sent."""
    return json.dumps(_members(size), separators=(",", ":"))


ATTACKS = (
    Attack("words to tokenize", "/tokenize", _inputs("word and ")),
    Attack("half of it to tokenize", "/tokenize", _inputs("word and "), share=0.5),
    Attack("combining accents to tokenize", "/tokenize", _inputs("\u0301"), share=0.3),
    Attack("joiners to tokenize", "/tokenize", _inputs("\u200d"), share=0.5),
    Attack("one word to tokenize", "/tokenize", _inputs("a"), share=0.5),
    Attack("spaces to tokenize", "/tokenize", _inputs(" "), share=0.5),
    Attack("one word to generate", "/generate", _inputs("a")),
    Attack("messages", CHAT, lambda size: _json({"messages": [USER] * (size // 33)})),
    Attack(
        "messages to tokenize",
        "/chat_tokenize",
        lambda size: _json({"messages": [USER] * (size // 33)}),
    ),
    Attack("long turns", CHAT, _chat(lambda size: {"messages": [_turn(size // 50)] * 50})),
    Attack("arguments with many keys", CHAT, _chat(lambda size: _call(_members(size))), count=2),
    Attack("the same as a text", CHAT, _chat(lambda size: _call(_texts(size * 4 // 5))), count=2),
    Attack("parts of a message", CHAT, _chat(lambda size: {"messages": [_parts(size // 25)]})),
    Attack("tools", CHAT, _chat(lambda size: {"tools": [_tool(i, {}) for i in range(size // 60)]})),
    Attack(
        "deep and wide parameters", CHAT, _chat(lambda size: {"tools": [_tool(0, _nested(size))]})
    ),
    Attack("tool choice", CHAT, _chat(lambda size: {"tool_choice": _members(size)})),
    Attack("stop strings", CHAT, _chat(lambda size: {"stop": ["x"] * (size // 4)})),
    Attack("one stop string", CHAT, _chat(lambda size: {"stop": "x" * size})),
    Attack(
        "prompts of a character",
        "/v1/completions",
        lambda size: _json({"prompt": ["x"] * (size // 4)}),
    ),
    Attack(
        "lists in lists",
        "/generate",
        lambda size: b'{"inputs":"a","x":[' + b"[]," * (size // 3) + b"[]]}",
    ),
    Attack(
        "a broken character at the end",
        "/generate",
        lambda size: b'{"inputs":"' + b"a" * size + b'\xff"}',
    ),
    Attack("a schema as a text", CHAT, _chat(lambda size: _schema(_texts(size * 4 // 5)))),
)


def _turn(size: int) -> dict[str, str]:
    return {"role": "user", "content": "word and " * (size // 9)}


def _parts(count: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "x"}] * count}


def _schema(text: str) -> dict[str, Any]:
    return {"response_format": {"type": "json", "value": text}}
