"""Models with latent attention cache latents, and give the tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
    MiniCPM3Config,
    PreTrainedModel,
    YoutuConfig,
)

from engine.attention.kv_cache import LayerShape, bytes_per_token
from engine.build import build_engine
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from tests.engine.fakes import CPU, run, token_ids
from tests.engine.model.architectures import SMALL, build_model, continuation, make_prompts
from tests.on_demand import on_demand

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_HEADS, CONTENT, POSITION, VALUE, LATENT = 4, 16, 8, 16, 24
_LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": NUM_HEADS,
    "kv_lora_rank": LATENT,
    "q_lora_rank": 16,
    "qk_nope_head_dim": CONTENT,
    "qk_rope_head_dim": POSITION,
    "v_head_dim": VALUE,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
_GROUPS: dict[str, Any] = {**_EXPERTS, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "deepseek_v2": lambda: DeepseekV2Config(**{**_LATENT, "q_lora_rank": None}, **_GROUPS),
    "deepseek_v3": lambda: DeepseekV3Config(**_LATENT, **_GROUPS),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(**_LATENT, **_EXPERTS),
    "minicpm3": lambda: MiniCPM3Config(**_LATENT),
    "youtu": lambda: YoutuConfig(**_LATENT),
}


def model_of(name: str) -> PreTrainedModel:
    return build_model(CONFIGS[name](), scale=2.0)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *((name, True) for name in CONFIGS),
        ("deepseek_v3", False),
        *(pytest.param(name, False, marks=on_demand) for name in CONFIGS if name != "deepseek_v3"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name: str, kernels: bool, tmp_path: Path) -> None:
    model, prompts = model_of(name), make_prompts()[:5]
    expected = [continuation(model, prompt, 8) for prompt in prompts]
    assert len({token_id for tokens in expected for token_id in tokens}) > 5, "tokens differ"
    model.save_pretrained(tmp_path)
    config = EngineConfig(
        model_id=str(tmp_path),
        socket_path=tmp_path / "s",
        device="cpu",
        block_size=4,
        max_total_tokens=128,
        max_batch_total_tokens=128,
        max_step_tokens=16,
        enable_native_kernels=kernels,
    )
    engine, info = build_engine(config)
    outputs = run(
        engine,
        *(
            Request(request_id=str(index), prompt_token_ids=prompt, max_new_tokens=8)
            for index, prompt in enumerate([*prompts, prompts[1]])
        ),
    )
    found = [token_ids(outputs[str(index)]) for index in range(len(prompts) + 1)]
    assert found == [*expected, expected[1]]
    assert engine.stats().num_cached_tokens > 0
    assert kernels == (info.attention == "native CPU kernels")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_takes_a_latent_and_a_key_in_each_layer(name: str) -> None:
    loaded = attach_paged_attention(model_of(name), CPU, torch.float32)
    row = LATENT + POSITION
    assert set(loaded.layers.values()) == {LayerShape(1, row, row, is_shared=True)}
    assert bytes_per_token(loaded.layers, torch.float32) == len(loaded.layers) * row * 4


def test_attention_that_an_indexer_thins_out_is_refused() -> None:
    model = build_model(DeepseekV32Config(**_LATENT, **_GROUPS), scale=2.0)
    with pytest.raises(ModelLoadError, match="an indexer chooses what its attention sees"):
        attach_paged_attention(model, CPU, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_own_attention_still_gets_every_heads_keys(name: str) -> None:
    """Logits beyond a window or a rope's first length are compared with it after loading."""
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        expected = model_of(name)(ids).logits
        loaded = attach_paged_attention(model_of(name), CPU, torch.float32)
        loaded.model.set_attn_implementation(loaded.stock_attention)
        torch.testing.assert_close(loaded.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
