"""A service over scripted engines, whose replies depend on no file of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from service.pb.tokenwire import v1 as pb
from tests.service.api.harness import METHODS, Answer, Service, with_body
from tests.service.fakes import (
    Script,
    WordTokenizer,
    eventually,
    script,
    step,
)

# Characters that JSON escapes and others that it does not, and an end-of-text token.
WORDS = ("<bos>", "Once", " upon", ' "a"', " \\time\n\t", " ñ🙂", "\u2028\x7f\x01", "</é>", "<eos>")
TEXT = (3, 4, 5, 6, 7)
EOS = len(WORDS) - 1


class GoldenTokenizer(WordTokenizer):
    """Every text has the same three tokens, every conversation the same prompt."""

    async def encode(
        self, _: str, *, truncate: int | None = None, max_tokens: int
    ) -> tuple[int, ...]:
        """The same tokens for every text."""
        ids = (0, 1, 2)
        return ids if truncate is None else ids[-truncate:]

    def too_long(self, *_: Any) -> bool:
        """Never."""
        return False

    chat_template = ""
    template_takes_tools = False

    def added_token(self, _: str) -> None:
        """None: no token was added."""

    def processes_for_chat(self, *_: Any) -> None:
        """None: no conversation is long."""

    def render_chat(self, messages: Sequence[dict[str, Any]], *_: Any, **__: Any) -> str:
        """The contents, line by line."""
        return "\n".join(item["content"] for item in messages)


class GoldenService(Service):
    """The service without any of the model's files."""

    def __init__(self, engine_script: Script) -> None:
        super().__init__(engine_script, GoldenTokenizer(*WORDS))


BREAKS_OFF = script(step(TEXT[0]))


async def answer(
    name: str, body: dict[str, Any], engine_script: Script, *, full: bool = False
) -> Answer:
    """What a REST caller receives."""
    request = with_body(getattr(pb, METHODS[name].input_type.name), json.dumps(body).encode())
    async with GoldenService(engine_script).running() as service:
        with service.full() if full else nullcontext():
            result = await service.ask(name, request, rest=True)
    await eventually(service.is_idle)
    return result
