"""All refused requests, one per row: what is sent, and exactly what is answered.

Each row of `REFUSED` is sent as JSON through Envoy and as a typed message over gRPC. Both answers
have the same text, except where a row has a `body_error`. Bodies that no message can hold are in
`bad_json`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.bad_chat import CHAT_ROWS
from tests.e2e.bad_completions import COMPLETION_ROWS
from tests.e2e.bad_generate import GENERATE_ROWS
from tests.e2e.refusal import CHAT, COMPLETIONS, MESSAGES, RPCS, Row

# The required field of a path; elsewhere it is `inputs`.
REQUIRED = {CHAT: "messages", "/chat_tokenize": "messages", COMPLETIONS: "prompt"}
_EXPECTED = {"inputs": "a string", "messages": "a list", "prompt": "a string or a list"}


def _missing(path: str) -> list[Row]:
    """Requests whose required field is absent or null: a message has no null."""
    name = REQUIRED.get(path, "inputs")
    error = f"{texts.SHAPE}missing field `{name}`"
    null = f"{texts.SHAPE}{name}: expected {_EXPECTED[name]}, got null"
    return [Row(path, {}, error, name), Row(path, {name: None}, error, name, body_error=null)]


def _ambiguous(given: str, **body: Any) -> Row:
    error = (
        f"{texts.VALIDATION}one of `inputs`, `messages` and `prompt` must be set. Given: {given}"
    )
    return Row("/invocations", body, error, None)


def _empty(body: dict[str, Any], body_error: str) -> Row:
    error = f"{texts.SHAPE}missing field `inputs`"
    return Row("/invocations", body, error, "inputs", body_error=texts.SHAPE + body_error)


_INVOCATION_ROWS = [
    Row("/invocations", {"stream": True}, f"{texts.SHAPE}missing field `inputs`", "inputs"),
    # A message cannot tell an empty list from an absent one; a body can.
    _empty({"messages": []}, "missing field `messages`"),
    _empty({"prompt": []}, texts.NO_PROMPT),
    _empty({"messages": None, "prompt": []}, "missing field `inputs`"),
    _ambiguous("`inputs` and `messages`", inputs="a", messages=MESSAGES),
    _ambiguous("`inputs` and `prompt`", inputs="", prompt=["a"], stream=True),
    _ambiguous("`messages` and `prompt`", messages=[{}], prompt=["a"], suffix=""),
    _ambiguous("`inputs` and `messages` and `prompt`", inputs="a", messages=MESSAGES, prompt=["a"]),
    # A body with `messages` or `prompt` gets the error of the path that takes it.
    *(
        replace(row, path="/invocations")
        for row in (*CHAT_ROWS, *COMPLETION_ROWS)
        if row.path in (CHAT, COMPLETIONS) and (row.body.get("messages") or row.body.get("prompt"))
    ),
]

REFUSED = [
    *(row for path in RPCS for row in _missing(path)),
    *GENERATE_ROWS,
    *CHAT_ROWS,
    *COMPLETION_ROWS,
    *_INVOCATION_ROWS,
]
