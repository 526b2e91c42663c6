"""Streams as REST callers read them, byte for byte, over an engine that plays a script.

Neither weights nor a tokenizer's files decide anything here. `UPDATE_GOLDEN=1 pytest
tests/service/api/test_golden_streams.py` rewrites `golden/*.sse`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import json_format, message_factory

from engine.protocol.request import FinishReason, Request, SequenceOutput
from service.api import rpc, servicer
from service.api.servicer import TextGenerationServicer
from service.generation.admission import Admission
from service.generation.generator import Generator
from service.generation.metrics import Metrics
from service.generation.pipeline import Pipeline
from service.generation.validation import Validator
from tests.golden import check_golden, check_no_others
from tests.service.api.test_servicer import METHODS, POOL, Answer, Service
from tests.service.fakes import (
    LIMITS,
    NO_GRAMMARS,
    SERVER,
    FakeEngineClient,
    Script,
    WordTokenizer,
    script,
    serving,
    step,
)

GOLDEN = Path(__file__).with_name("golden")
NOW = 1706270835.75

# Everything that JSON escapes or does not, and an end.
WORDS = ("<bos>", "Once", " upon", ' "a"', " \\time\n\t", " ñ🙂", "\u2028\x7f\x01", "</é>", "<eos>")
TEXT = (3, 4, 5, 6, 7)
EOS = len(WORDS) - 1


class GoldenTokenizer(WordTokenizer):
    """Every text has the same three tokens, every conversation the same prompt."""

    async def encode(self, _: str, *, truncate: int | None = None) -> tuple[int, ...]:
        """The same for everybody."""
        ids = (0, 1, 2)
        return ids if truncate is None else ids[-truncate:]

    def too_long(self, *_: Any) -> bool:
        """Never."""
        return False

    def render_chat(self, messages: Sequence[dict[str, Any]], *_: Any) -> str:
        """The contents, line by line."""
        return "\n".join(item["content"] for item in messages)


class GoldenService(Service):
    """The service without any of the model's files."""

    def __init__(self, play: Script) -> None:
        tokenizer: Any = GoldenTokenizer(*WORDS)
        self.client = FakeEngineClient(play)
        self.admission = Admission(LIMITS.max_concurrent_requests)
        self.metrics = Metrics(LIMITS)
        client: Any = self.client
        pipeline = Pipeline(
            self.admission,
            Validator(LIMITS, tokenizer, NO_GRAMMARS),
            Generator(client, tokenizer),
            self.metrics,
        )
        self.servicer = TextGenerationServicer(pipeline, tokenizer, client, SERVER, self.metrics)


async def tells(request: Request) -> AsyncGenerator[SequenceOutput]:
    """The text and its end, with logprobs of all shapes."""
    for number, token_id in enumerate((*TEXT, EOS), start=1):
        finish = FinishReason.EOS_TOKEN if token_id == EOS else None
        if number == request.max_new_tokens:
            finish = FinishReason.LENGTH
        tops = [(token_id, -0.25 * number), (EOS, -1e-7), (1, float("-inf"))]
        yield step(
            token_id,
            logprob=[-0.03414917, 0.0, -12.5, float("-inf")][number % 4],
            top=tops[: request.sampling.top_n_tokens],
            finish=finish,
        )
        if finish is not None:
            return


def in_turn(*plays: Script) -> Script:
    """A script of its own for each request."""
    turns = iter(plays)
    return lambda request: next(turns)(request)


GENERATE: dict[str, Any] = {"inputs": "Once upon"}
DETAILS: dict[str, Any] = {"details": True}
SEEDED: dict[str, Any] = {"do_sample": True, "seed": 2**64 - 1, "top_n_tokens": 3, **DETAILS}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Once"}],
    "temperature": 0.0,
    "stream": True,
}
PROMPTS: dict[str, Any] = {"prompt": ["Once", "Once upon"], "temperature": 0.0, "stream": True}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
FAILS = script(step(TEXT[0]), step(error='no "luck"'))
BREAKS_OFF = script(step(TEXT[0]))

# name: RPC, JSON of the request, script
CASES: dict[str, tuple[str, dict[str, Any], Script]] = {
    "generate_greedy": ("GenerateStream", {**GENERATE, "parameters": {}}, tells),
    "generate_details": ("GenerateStream", {**GENERATE, "parameters": DETAILS}, tells),
    "generate_seeded_top_tokens": ("GenerateStream", {**GENERATE, "parameters": SEEDED}, tells),
    "generate_length": (
        "GenerateStream",
        {**GENERATE, "parameters": {"max_new_tokens": 2, **DETAILS}},
        tells,
    ),
    "generate_stop": (
        "GenerateStream",
        {**GENERATE, "parameters": {"stop": ["🙂"], **DETAILS}},
        tells,
    ),
    "generate_full_text": (
        "GenerateStream",
        {**GENERATE, "parameters": {"return_full_text": True}},
        tells,
    ),
    "generate_invalid": ("GenerateStream", {**GENERATE, "parameters": {"top_p": 1.0}}, tells),
    "generate_best_of": ("GenerateStream", {**GENERATE, "parameters": {"best_of": 2}}, tells),
    "generate_failed": ("GenerateStream", {**GENERATE, "parameters": {}}, FAILS),
    "generate_incomplete": ("GenerateStream", {**GENERATE, "parameters": {}}, BREAKS_OFF),
    "compat_greedy": ("CompatGenerate", {**GENERATE, "parameters": DETAILS, "stream": True}, tells),
    "compat_failed": ("CompatGenerate", {**GENERATE, "parameters": {}, "stream": True}, FAILS),
    "chat_greedy": ("Chat", CHAT, tells),
    "chat_logprobs": ("Chat", {**CHAT, "logprobs": True}, tells),
    "chat_top_logprobs": ("Chat", {**CHAT, "logprobs": True, "top_logprobs": 3}, tells),
    "chat_usage": ("Chat", {**CHAT, "max_tokens": 2, **USAGE}, tells),
    "chat_invalid": ("Chat", {**CHAT, "max_tokens": 0}, tells),
    "chat_failed": ("Chat", {**CHAT, **USAGE}, FAILS),
    "chat_incomplete": ("Chat", CHAT, BREAKS_OFF),
    "completions_one": ("Completions", {**PROMPTS, "prompt": ["Once"]}, tells),
    "completions_two": ("Completions", PROMPTS, tells),
    "completions_usage": ("Completions", {**PROMPTS, "max_tokens": 2, **USAGE}, tells),
    "completions_one_shorter": (
        "Completions",
        {**PROMPTS, **USAGE},
        in_turn(script(step(EOS, finish=FinishReason.EOS_TOKEN)), tells),
    ),
    "completions_one_failed": ("Completions", {**PROMPTS, **USAGE}, in_turn(FAILS, tells)),
    "completions_all_failed": ("Completions", PROMPTS, FAILS),
    "completions_invalid": ("Completions", {**PROMPTS, "top_p": 1.0}, tells),
    "invocations_generate": ("Invocations", {**GENERATE, "parameters": {}, "stream": True}, tells),
    "invocations_chat": ("Invocations", CHAT, tells),
    "invocations_completions": ("Invocations", PROMPTS, tells),
}


async def answer(name: str, body: dict[str, Any], play: Script, *, full: bool = False) -> Answer:
    """What a REST caller hears; JSON becomes a message as Envoy makes it one."""
    service = GoldenService(play)
    message = message_factory.GetMessageClass(METHODS[name].input_type)()
    request = json_format.Parse(json.dumps(body), message).SerializeToString()
    async with serving(rpc.handlers(service.servicer, POOL), service.metrics) as channel:
        service.channel = channel
        with service.admission.permit(LIMITS.max_concurrent_requests if full else 0):
            result = await service.ask(name, request, rest=True)
    assert service.client.num_open == service.admission.num_active == 0
    return result


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`created` is always the same."""
    monkeypatch.setattr(servicer, "time", SimpleNamespace(time=lambda: NOW))


@pytest.mark.parametrize("case", CASES)
async def test_stream_has_these_bytes(case: str) -> None:
    result = await answer(*CASES[case])
    assert result.error is None
    assert result.content_types == {"text/event-stream"}
    check_golden(GOLDEN / f"{case}.sse", result.body)


@pytest.mark.parametrize("case", ["generate_greedy", "compat_greedy", "chat_greedy"])
async def test_stream_on_a_full_server_has_these_bytes(case: str) -> None:
    result = await answer(*CASES[case], full=True)
    assert result.error is None
    check_golden(GOLDEN / f"{case.removesuffix('greedy')}overloaded.sse", result.body)


@pytest.mark.parametrize(
    ("case", "twin"),
    [
        ("invocations_generate", "compat_greedy"),
        ("invocations_chat", "chat_greedy"),
        ("invocations_completions", "completions_two"),
    ],
)
async def test_invocation_is_the_stream_that_was_meant(case: str, twin: str) -> None:
    _, body, play = CASES[case]
    meant, _, _ = CASES[twin]
    assert (await answer("Invocations", body, play)).body == (await answer(meant, body, play)).body


def test_every_golden_stream_has_its_case() -> None:
    full = [f"{name}_overloaded" for name in ("generate", "compat", "chat")]
    check_no_others(GOLDEN, (f"{name}.sse" for name in [*CASES, *full]))
