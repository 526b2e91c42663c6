"""All refused requests, one per row: what is sent, and exactly what is answered.

Each row of `REFUSED` is sent as JSON through Envoy and as a typed message over gRPC; both answers
have the same text.
"""

from __future__ import annotations

from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.bad_chat import CHAT_ROWS
from tests.e2e.bad_completions import COMPLETION_ROWS
from tests.e2e.bad_generate import GENERATE_ROWS
from tests.e2e.refusal import CHAT, COMPLETIONS, MESSAGES, RPCS, Row

# The required field of a path; elsewhere it is `inputs`.
REQUIRED = {CHAT: "messages", "/chat_tokenize": "messages", COMPLETIONS: "prompt"}


def _missing(path: str) -> list[Row]:
    """Requests whose required field is absent or null."""
    name = REQUIRED.get(path, "inputs")
    error = f"{texts.SHAPE}missing field `{name}`"
    return [Row(path, {}, error, name), Row(path, {name: None}, error, name)]


def _ambiguous(given: str, **body: Any) -> Row:
    error = (
        f"{texts.VALIDATION}one of `inputs`, `messages` and `prompt` must be set. Given: {given}"
    )
    return Row("/invocations", body, error, None)


_INVOCATION_ROWS = [
    Row("/invocations", {"stream": True}, f"{texts.SHAPE}missing field `inputs`", "inputs"),
    Row("/invocations", {"messages": []}, f"{texts.SHAPE}missing field `inputs`", "inputs"),
    Row("/invocations", {"prompt": []}, f"{texts.SHAPE}missing field `inputs`", "inputs"),
    _ambiguous("`inputs` and `messages`", inputs="a", messages=MESSAGES),
    _ambiguous("`inputs` and `prompt`", inputs="", prompt=["a"], stream=True),
    _ambiguous("`messages` and `prompt`", messages=[{}], prompt=["a"], suffix=""),
    _ambiguous("`inputs` and `messages` and `prompt`", inputs="a", messages=MESSAGES, prompt=["a"]),
    # A body with `messages` or `prompt` gets the error of the path that takes it.
    *(
        Row("/invocations", row.body, row.error, row.field, row.error_type, row.in_band)
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
