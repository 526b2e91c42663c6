"""The detector of transformers finds watermarked texts, which are the same over REST and gRPC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, WatermarkDetector, WatermarkingConfig

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import PROMPT, Stack
from tests.paths import REPOSITORY

# A watermark needs steps with several likely tokens; at temperature 2 this model has enough.
PARAMETERS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 2.0,
    "max_new_tokens": 150,
    "details": True,
}
SEEDS = range(8)
Z_LIMIT = 4.0  # a text without a watermark exceeds it once in 31,000


def tokens(stack: Stack, **parameters: Any) -> list[int]:
    """The ids of a text."""
    details = stack.generate(**PARAMETERS, **parameters)["details"]
    return [token["id"] for token in details["tokens"]]


def z_score(token_ids: list[int]) -> float:
    """How far the number of green tokens is above its expectation, in standard deviations."""
    config = WatermarkingConfig(
        greenlist_ratio=0.5,
        bias=2.0,
        hashing_key=15485863,
        seeding_scheme="lefthash",
        context_width=1,
    )
    model = AutoConfig.from_pretrained(REPOSITORY / "models" / "demo")
    found = WatermarkDetector(model, "cpu", config)(torch.tensor([token_ids]), return_dict=True)
    assert found.num_tokens_scored[0] >= 150
    return float(found.z_score[0])


@pytest.mark.parametrize("watermark", [True, False])
def test_detector_finds_only_watermarked_texts(stack: Stack, watermark: bool) -> None:
    texts = [tokens(stack, seed=seed, watermark=watermark) for seed in SEEDS]
    assert (z_score([token_id for text in texts for token_id in text]) > Z_LIMIT) == watermark


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_watermarked_tokens_are_the_same_over_grpc(
    stack: Stack, api: ReflectionClient, seed: int
) -> None:
    parameters = {**PARAMETERS, "seed": seed, "watermark": True}
    message = api.call("Generate", {"inputs": PROMPT, "parameters": parameters})
    marked = tokens(stack, seed=seed, watermark=True)
    assert [token.id for token in message.details.tokens] == marked
    assert marked != tokens(stack, seed=seed)


def test_watermark_does_not_switch_sampling_on(stack: Stack) -> None:
    first, second = (stack.generate(watermark=True)["details"] for _ in range(2))
    assert first == second
    assert first["seed"] is None


def test_chats_have_no_watermark(stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 60, "seed": 1}
    body |= {"temperature": 2.0}
    plain, asked = (
        stack.http.post("/v1/chat/completions", json=body | more).json()["choices"]
        for more in ({}, {"watermark": True})
    )
    assert plain == asked
