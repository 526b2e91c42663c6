"""The process that tokenises long texts and renders long conversations.

It also makes the reply that lists a text's tokens, which takes longer than the tokenising.
`text/long_texts.py` asks it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ServiceError
from ..text.escaping import EscapedText
from ..text.long_texts import Form, TooManyTokensError
from ..text.tokenizer import TextTokenizer, TokenSpan
from . import framing, render

Answer = dict[str, Any]


class TextWorker:
    """Answers the requests.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def answer(self, request: dict[str, Any]) -> Iterator[bytes | Answer]:
        """The answer to a request; before it come the parts of a list."""
        jobs: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "encode": self._encode,
            "render": self._render,
        }
        try:
            if request["do"] == "list":
                yield from self._list(request)
            else:
                yield jobs[request["do"]](request)
        except MemoryError:
            yield {"no_memory": True}

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

    def _list(self, request: dict[str, Any]) -> Iterator[bytes | Answer]:
        text, is_prompt, left = _text(request), request["is_prompt"], request["max_bytes"]
        slices = self._tokenizer.span_slices(text, is_prompt=is_prompt)
        prompt = text if is_prompt else None
        for reply in _replies(slices, prompt, request["form"]):
            left -= len(reply)
            if left < 0:
                yield {"too_large": True}
                return
            yield reply
        yield {}


def _replies(slices: Iterator[list[TokenSpan]], prompt: str | None, form: Form) -> Iterator[bytes]:
    if form == "typed":
        return framing.token_parts(slices, prompt)
    return (framing.http_reply(render.JSON, part) for part in render.token_parts(slices, prompt))


def _text(request: dict[str, Any]) -> str:
    text, special = request["text"], request["special"]
    return str(text) if special is None else EscapedText(text, map(tuple, special))


def start(setup: list[Any]) -> Callable[[dict[str, Any]], Iterator[bytes | Answer]]:
    """Loads the tokenizer: `setup` is what `TextTokenizer.load` takes, in its order."""
    model_id, revision, config_path, trust_remote_code = setup
    tokenizer = TextTokenizer.load(
        model_id,
        revision,
        config_path=None if config_path is None else Path(config_path),
        trust_remote_code=trust_remote_code,
    )
    return TextWorker(tokenizer).answer
