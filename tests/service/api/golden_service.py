"""A service over scripted engines, whose replies depend on no file of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from service.api.servicer import TextGenerationServicer
from service.generation.admission import Admission
from service.generation.generator import Generator
from service.generation.load import LoadMeter
from service.generation.metrics import Metrics
from service.generation.pipeline import Pipeline
from service.generation.validation import Validator
from service.pb.tokenwire import v1 as pb
from tests.service.api.harness import METHODS, Answer, Service, with_body
from tests.service.fakes import (
    LANES,
    LIMITS,
    NO_GRAMMARS,
    SERVER,
    FakeEngineClient,
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
        tokenizer: Any = GoldenTokenizer(*WORDS)
        self.client = FakeEngineClient(engine_script)
        self.admission = Admission(LIMITS.max_concurrent_requests)
        self.metrics = Metrics(LIMITS)
        client: Any = self.client
        pipeline = Pipeline(
            self.admission,
            Validator(LIMITS, tokenizer, NO_GRAMMARS),
            Generator(client, tokenizer),
            self.metrics,
        )
        self.servicer = TextGenerationServicer(
            pipeline, tokenizer, client, SERVER, self.metrics, LoadMeter(), LANES
        )


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
