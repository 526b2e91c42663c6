"""Lengths from which on a model computes something else are found, and checked beyond."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)

from engine.attention.paged import ReferenceAttention
from engine.model import thresholds
from engine.model.loaded import LoadedModel
from engine.model.self_check import attach_paged_attention
from engine.model.thresholds import Threshold, find, first_not_followed, served_tokens
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import CPU, PECULIAR, SMALL, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA4 = PECULIAR["llama4"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "window in every layer": lambda: MistralConfig(**SMALL, sliding_window=40),
    "window in some layers": lambda: Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=40, layer_types=["sliding_attention"] * 3
    ),
    "chunks, and a scale by position": LLAMA4,
    "window in layers with their own mask": lambda: GPTNeoConfig(
        vocab_size=128,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=512,
        attention_types=[[["global", "local"], 1]],
        window_size=40,
    ),
}
FIELDS = {
    "window in every layer": {"sliding_window"},
    "window in some layers": {"sliding_window"},
    "chunks, and a scale by position": {"attention_chunk_size", "floor_scale"},
    "window in layers with their own mask": {"window_size"},
}


def load(config: Any) -> LoadedModel:
    return attach_paged_attention(build_model(config), CPU, torch.float32)


def test_a_short_check_does_not_see_what_begins_later() -> None:
    """Why there are checks beyond thresholds: without chunks the model is accepted."""
    load(LLAMA4())  # compared over 19 tokens, and its chunk has 32
    found = first_not_followed(replace(load(LLAMA4()), chunk_sizes={}), 512)
    assert found is not None
    assert found[0] == Threshold(24, "floor_scale")  # whose text of 43 tokens exceeds the chunk


@pytest.mark.parametrize("is_worthwhile", [True, False], ids=["long text", "small number"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_engine_follows_passes_in_both_ways(
    name: str, is_worthwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_worthwhile:
        monkeypatch.setitem(thresholds._WORTHWHILE, "cpu", 0.0)
    loaded = load(CONFIGS[name]())
    assert {one.field for one in find(loaded.model.config)} == FIELDS[name]
    before = loaded.model.config.to_dict()
    assert first_not_followed(loaded, 512) is None
    assert loaded.model.config.to_dict() == before


@pytest.mark.parametrize("is_worthwhile", [True, False], ids=["long text", "small number"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_engine_does_not_follow_is_found_in_both_ways(
    name: str, is_worthwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = ReferenceAttention.paged_attention

    def unbounded(self: ReferenceAttention, *arguments: Any, **options: Any) -> Tensor:
        return stock(self, *arguments, **{**options, "sliding_window": None, "chunk_size": None})

    loaded = load(CONFIGS[name]())
    monkeypatch.setattr(ReferenceAttention, "paged_attention", unbounded)
    if not is_worthwhile:
        monkeypatch.setitem(thresholds._WORTHWHILE, "cpu", 0.0)
    found = first_not_followed(loaded, 512)
    assert found is not None
    assert found[0].field in FIELDS[name]
    assert "logits differ by" in found[1]


def test_a_scale_by_position_needs_the_positions_of_the_step() -> None:
    loaded = load(Llama4TextConfig(**{**LLAMA4().to_dict(), "attention_chunk_size": 512}))
    assert loaded.asks_positions
    assert first_not_followed(loaded, 512) is None
    found = first_not_followed(replace(loaded, asks_positions=False), 512)
    assert found is not None
    assert found[0].field == "floor_scale"


def test_texts_end_at_what_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    loaded = replace(load(LLAMA4()), chunk_sizes={})
    with caplog.at_level(logging.WARNING):
        num_tokens, note = served_tokens(loaded, 512, is_asked=False)
    assert num_tokens == 24
    assert note is not None
    assert "is served up to floor_scale (24 tokens): logits differ by" in note
    assert note in caplog.text
    with pytest.raises(ModelLoadError, match=r"must be <= 24\. Llama4.* floor_scale") as caught:
        served_tokens(loaded, 512, is_asked=True)
    assert "\n" not in str(caught.value)
    assert served_tokens(loaded, 24, is_asked=True) == (24, None)


def test_thresholds_are_found_in_nested_fields() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(**SMALL, rope_parameters={**rope, "original_max_position_embeddings": 64})
    assert find(config) == [Threshold(64, "rope_parameters.original_max_position_embeddings")]
    assert first_not_followed(load(config), 512) is None


def test_numbers_that_are_no_lengths_are_not_thresholds() -> None:
    config = LlamaConfig(**SMALL, max_window_layers=28, window_kind=64, topk_group=40)
    assert find(config) == []
    assert find(MistralConfig(**SMALL, sliding_window=9)) == []  # the self-check sees it


def test_a_model_that_fails_beyond_a_threshold_is_not_served_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load(CONFIGS["window in every layer"]())

    def broken(*_: Any, **__: Any) -> PreTrainedModel:
        raise RuntimeError("no room")

    monkeypatch.setattr(thresholds, "difference_of_last", broken)
    found = first_not_followed(loaded, 512)
    assert found == (Threshold(40, "sliding_window"), "it does not run there: no room")
