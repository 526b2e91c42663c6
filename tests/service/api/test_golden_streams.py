"""Streams as REST callers receive them, byte for byte, over a scripted engine.

Neither weights nor a tokenizer's files have any influence. `UPDATE_GOLDEN=1 pytest
tests/service/api/test_golden_streams.py` rewrites `golden/*.sse`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.protocol.request import FinishReason, Request, SequenceOutput
from service.openai import head
from tests.golden import check_golden, check_no_others
from tests.service.api.golden_service import BREAKS_OFF, EOS, TEXT, answer
from tests.service.fakes import Script, script, step

GOLDEN = Path(__file__).with_name("golden")
NOW = 1706270835.75


async def whole_text(request: Request) -> AsyncGenerator[SequenceOutput]:
    """The text and its end, with log-probabilities of all forms."""
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


def in_turn(*scripts: Script) -> Script:
    """A different script for each request, in order."""
    turns = iter(scripts)
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

# name: RPC, JSON of the request, script
CASES: dict[str, tuple[str, dict[str, Any], Script]] = {
    "generate_greedy": ("GenerateStream", {**GENERATE, "parameters": {}}, whole_text),
    "generate_details": ("GenerateStream", {**GENERATE, "parameters": DETAILS}, whole_text),
    "generate_seeded_top_tokens": (
        "GenerateStream",
        {**GENERATE, "parameters": SEEDED},
        whole_text,
    ),
    "generate_length": (
        "GenerateStream",
        {**GENERATE, "parameters": {"max_new_tokens": 2, **DETAILS}},
        whole_text,
    ),
    "generate_stop": (
        "GenerateStream",
        {**GENERATE, "parameters": {"stop": ["🙂"], **DETAILS}},
        whole_text,
    ),
    "generate_full_text": (
        "GenerateStream",
        {**GENERATE, "parameters": {"return_full_text": True}},
        whole_text,
    ),
    "generate_invalid": ("GenerateStream", {**GENERATE, "parameters": {"top_p": 1.0}}, whole_text),
    "generate_best_of": ("GenerateStream", {**GENERATE, "parameters": {"best_of": 2}}, whole_text),
    "generate_failed": ("GenerateStream", {**GENERATE, "parameters": {}}, FAILS),
    "generate_incomplete": ("GenerateStream", {**GENERATE, "parameters": {}}, BREAKS_OFF),
    "compat_greedy": (
        "CompatGenerate",
        {**GENERATE, "parameters": DETAILS, "stream": True},
        whole_text,
    ),
    "compat_failed": ("CompatGenerate", {**GENERATE, "parameters": {}, "stream": True}, FAILS),
    "chat_greedy": ("Chat", CHAT, whole_text),
    "chat_logprobs": ("Chat", {**CHAT, "logprobs": True}, whole_text),
    "chat_top_logprobs": ("Chat", {**CHAT, "logprobs": True, "top_logprobs": 3}, whole_text),
    "chat_usage": ("Chat", {**CHAT, "max_tokens": 2, **USAGE}, whole_text),
    "chat_invalid": ("Chat", {**CHAT, "max_tokens": 0}, whole_text),
    "chat_failed": ("Chat", {**CHAT, **USAGE}, FAILS),
    "chat_incomplete": ("Chat", CHAT, BREAKS_OFF),
    "completions_one": ("Completions", {**PROMPTS, "prompt": ["Once"]}, whole_text),
    "completions_two": ("Completions", PROMPTS, whole_text),
    "completions_usage": ("Completions", {**PROMPTS, "max_tokens": 2, **USAGE}, whole_text),
    "completions_one_shorter": (
        "Completions",
        {**PROMPTS, **USAGE},
        in_turn(script(step(EOS, finish=FinishReason.EOS_TOKEN)), whole_text),
    ),
    "completions_one_failed": ("Completions", {**PROMPTS, **USAGE}, in_turn(FAILS, whole_text)),
    "completions_all_failed": ("Completions", PROMPTS, FAILS),
    "completions_invalid": ("Completions", {**PROMPTS, "top_p": 1.0}, whole_text),
    "invocations_generate": (
        "Invocations",
        {**GENERATE, "parameters": {}, "stream": True},
        whole_text,
    ),
    "invocations_chat": ("Invocations", CHAT, whole_text),
    "invocations_completions": ("Invocations", PROMPTS, whole_text),
}


@pytest.fixture(autouse=True)
def fixed_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`created` and `id` are always the same."""
    monkeypatch.setattr(head, "time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setattr(
        head, "secrets", SimpleNamespace(token_hex=lambda num_bytes: "0f" * num_bytes)
    )


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
async def test_invocation_is_the_stream_of_the_chosen_endpoint(case: str, twin: str) -> None:
    _, body, engine_script = CASES[case]
    meant, _, _ = CASES[twin]
    assert (await answer("Invocations", body, engine_script)).body == (
        await answer(meant, body, engine_script)
    ).body


def test_every_golden_stream_has_its_case() -> None:
    full = [f"{name}_overloaded" for name in ("generate", "compat", "chat")]
    check_no_others(GOLDEN, (f"{name}.sse" for name in [*CASES, *full]))
