"""Small random models whose layers keep a state beside the KV cache, or instead of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import pytest
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.engine.model.architectures import build_model, continuation
from tests.on_demand import on_demand

_TOKENS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION: dict[str, Any] = {
    **_TOKENS,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEADS: dict[str, Any] = {**_ATTENTION, "head_dim": 16}
_MIXED = ["linear_attention", "full_attention"] * 2
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": _MIXED,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT: dict[str, Any] = {**_EXPERTS, "shared_expert_intermediate_size": 32}
_CONVOLUTIONS = ["conv", "full_attention"] * 2

STATEFUL: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: Lfm2Config(**_ATTENTION, layer_types=_CONVOLUTIONS),
    "lfm2_moe": lambda: Lfm2MoeConfig(
        **_ATTENTION, **_EXPERTS, num_dense_layers=1, layer_types=_CONVOLUTIONS
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**_HEADS, **_DELTA_NET, **_SHARED_EXPERT),
    "qwen3_5": lambda: Qwen3_5TextConfig(**_HEADS, **_DELTA_NET),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**_HEADS, **_DELTA_NET, **_SHARED_EXPERT),
    "olmo_hybrid": lambda: OlmoHybridConfig(**_ATTENTION, **_DELTA_NET),
    "kimi_linear": lambda: KimiLinearConfig(
        **{**_ATTENTION, "num_key_value_heads": 4},
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        linear_head_dim=16,
        linear_num_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=_MIXED,
    ),
    "minimax": lambda: MiniMaxConfig(
        **_HEADS, num_local_experts=4, num_experts_per_tok=2, block_size=8, layer_types=_MIXED
    ),
    "falcon_h1": lambda: FalconH1Config(**_HEADS, **{**_MAMBA, "mamba_n_heads": 4}, mamba_d_ssm=64),
    "granite_hybrid": lambda: GraniteMoeHybridConfig(
        **_ATTENTION,
        **_MAMBA,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=96,
    ),
    "bamba": lambda: BambaConfig(**_ATTENTION, **_MAMBA, attn_layer_indices=[1, 3]),
    "nemotron_h": lambda: NemotronHConfig(
        **{name: value for name, value in _HEADS.items() if name != "num_hidden_layers"},
        hybrid_override_pattern="M*-M",
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
        chunk_size=8,
    ),
    "mamba2": lambda: Mamba2Config(
        **_TOKENS,
        num_hidden_layers=3,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        chunk_size=8,
    ),
    "mamba": lambda: MambaConfig(**_TOKENS, num_hidden_layers=3, state_size=8),
    "falcon_mamba": lambda: FalconMambaConfig(**_TOKENS, num_hidden_layers=3, state_size=8),
    "jamba": lambda: JambaConfig(
        **_ATTENTION, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8
    ),
}
SAMPLE = {"lfm2", "qwen3_5", "kimi_linear", "falcon_h1", "granite_hybrid", "jamba"}  # of each kind
TOKEN_BY_TOKEN = {"mamba", "falcon_mamba", "jamba"}  # their scan begins with an empty state


def names(sample: Collection[str] = SAMPLE) -> list[object]:
    """All architectures as parameters of a test; the others than the sample only on demand."""
    return [pytest.param(name, marks=() if name in sample else on_demand) for name in STATEFUL]


def stateful_model(name: str) -> PreTrainedModel:
    """The model of an architecture, the same at every call."""
    return build_model(STATEFUL[name](), scale=2.0)


@cache
def generated(name: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The greedy continuation of a prompt by transformers."""
    return continuation(stateful_model(name), prompt, num_tokens)
