"""Compares a typed reply with the JSON of the same reply."""

from __future__ import annotations

import dataclasses
from typing import Any

import betterproto2
import numpy as np

from service.pb.tokenwire import v1 as pb

# Fields that only typed replies have, or that JSON has in a form of its own.
_NO_JSON = {
    "http",
    "max_top_n_tokens",
    "vocab_size",
    "eos_token_ids",
    "context_length",
    "max_request_values",
    "max_messages",
    "max_message_parts",
    "max_tools",
    "max_stop_sequence_bytes",
    "max_tokenize_bytes",
    "max_choices",
    "reason",
    "tool_calls",
}
# Fields that typed replies have in more places than JSON.
_LESS_JSON = {
    "cached_tokens",
    "finish_reason",
    "matched_stop",
    "request_id",
    "token_ids",
    "usage",
}


def assert_agree(message: Any, body: Any, path: str = "") -> None:
    """Asserts that a typed reply, after serialisation, and a rendered one have equal content."""
    if isinstance(body, dict):
        names = {field.name for field in dataclasses.fields(message)} - _NO_JSON
        for name in names - body.keys() - _LESS_JSON:
            assert not getattr(message, name), f"{path}.{name} is not in the JSON"
        for name, item in body.items():
            if name not in names:
                assert name == "object" or item is None, f"{path}.{name} is not in the message"
            else:
                assert_agree(getattr(message, name), item, f"{path}.{name}")
    elif isinstance(body, list):
        items = message.tokens if isinstance(message, pb.TokenList) else message
        assert len(items) == len(body), path
        for index, (left, right) in enumerate(zip(items, body, strict=True)):
            assert_agree(left, right, f"{path}[{index}]")
    elif isinstance(message, betterproto2.Enum):
        assert message.name.lower() == body, path
    elif isinstance(body, float):
        assert np.float32(message) == np.float32(body), path
    else:
        assert message == body, path
        assert type(message) is type(body), path
