"""The process that tokenises long texts and renders long conversations.

It also makes the reply that lists a text's tokens, which takes longer than the tokenising.
`text/long_texts.py` asks it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import ServiceError
from ..text.escaping import EscapedText
from ..text.long_texts import TooManyTokensError
from ..text.tokenizer import TextTokenizer
from . import framing, render

Answer = dict[str, Any]


class _ReplyTooLargeError(Exception):
    """The reply has more bytes than a message may have."""


class TextWorker:
    """Answers the requests.

    Args:
        tokenizer: the model's.
        max_reply_bytes: of a list of tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, max_reply_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._max_reply_bytes = max_reply_bytes

    def answer(self, request: dict[str, Any]) -> Answer:
        """The answer to a request."""
        jobs: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "encode": self._encode,
            "render": self._render,
            "list": self._list,
        }
        try:
            return jobs[request["do"]](request)
        except MemoryError:
            return {"no_memory": True}

    def _encode(self, request: dict[str, Any]) -> Answer:
        text, truncate, max_tokens = _text(request), request["truncate"], request["max_tokens"]
        try:
            ids = self._tokenizer.encode_now(text, truncate, max_tokens)
        except TooManyTokensError as error:
            return {"count": error.count}
        return {"ids": array("I", ids).tobytes()}

    def _render(self, request: dict[str, Any]) -> Answer:
        messages, tools, variables = json.loads(request["conversation"])
        try:
            return {"prompt": self._tokenizer.render_chat(messages, tools, **variables)}
        except ServiceError as error:
            return {"error": error.reason}

    def _list(self, request: dict[str, Any]) -> Answer:
        text, is_prompt = _text(request), request["is_prompt"]
        slices = self._tokenizer.span_slices(text, is_prompt=is_prompt)
        prompt = text if is_prompt else None
        try:
            if request["form"] == "rest":
                reply = self._joined(render.token_parts(slices, prompt))
                return {"reply": framing.http_reply(render.JSON, reply)}
            return {"reply": self._joined(framing.token_parts(slices, prompt))}
        except _ReplyTooLargeError:
            return {"too_large": True}

    def _joined(self, parts: Iterable[bytes]) -> bytes:
        """All parts together.

        Raises:
            _ReplyTooLargeError: they are too large.
        """
        reply = bytearray()
        for part in parts:
            reply += part
            if len(reply) > self._max_reply_bytes:
                raise _ReplyTooLargeError
        return bytes(reply)


def _text(request: dict[str, Any]) -> str:
    text, special = request["text"], request["special"]
    return str(text) if special is None else EscapedText(text, map(tuple, special))


def start(setup: list[Any]) -> Callable[[dict[str, Any]], Answer]:
    """Loads the tokenizer: model, revision and configuration are `TextTokenizer.load`'s."""
    model_id, revision, config_path, max_reply_bytes = setup
    tokenizer = TextTokenizer.load(
        model_id, revision, config_path=None if config_path is None else Path(config_path)
    )
    return TextWorker(tokenizer, max_reply_bytes).answer
