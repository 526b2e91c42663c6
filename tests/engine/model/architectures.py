"""Small random models of every tested architecture, and the tokens that transformers generates."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    HunYuanMoEV1Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    XGLMConfig,
)

CPU = torch.device("cpu")
NUM_NEW_TOKENS = 10
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"head_dim": 16}
_WINDOW: dict[str, Any] = {"sliding_window": 9}  # shorter than most prompts
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, **_HEADS),
    "mistral": lambda: MistralConfig(**SMALL, **_WINDOW),
    "gemma": lambda: GemmaConfig(**SMALL, **_HEADS),
    "gemma2": lambda: Gemma2Config(**SMALL, **_HEADS, **_WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL,
        **_HEADS,
        **_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "phi": lambda: PhiConfig(**{**SMALL, "num_key_value_heads": 4}),
    "phi3": lambda: Phi3Config(**SMALL),
}
_OLD: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Older code, and other forms of attention and of experts.
PECULIAR: dict[str, Callable[[], Any]] = {
    "llama4": lambda: Llama4TextConfig(
        **SMALL,
        **_HEADS,
        intermediate_size_mlp=96,
        num_local_experts=4,
        attention_chunk_size=32,  # longer than the self-check's text, shorter than some prompts
        floor_scale=24,
        attn_scale=0.5,
        no_rope_layers=[1, 1, 0],
    ),
    "gptj": lambda: GPTJConfig(**_OLD, n_positions=512, rotary_dim=8),
    "falcon": lambda: FalconConfig(**_OLD),
    "falcon, heads": lambda: FalconConfig(
        **_OLD, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon, groups": lambda: FalconConfig(**_OLD, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, biased": lambda: FalconConfig(
        **{**_OLD, "hidden_size": 96},  # heads of 24: the scale is no power of two
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
    ),
    "bloom": lambda: BloomConfig(**{**_OLD, "hidden_size": 96, "num_attention_heads": 6}),
    "mpt": lambda: MptConfig(
        vocab_size=128,
        d_model=96,
        n_layers=3,
        n_heads=6,
        attn_config={"clip_qkv": 4.0, "softmax_scale": 0.3},
    ),
    "codegen": lambda: CodeGenConfig(**_OLD, n_positions=512, rotary_dim=8),
    "gpt_neo": lambda: GPTNeoConfig(
        **{**_OLD, "num_hidden_layers": 4},
        max_position_embeddings=512,
        attention_types=[[["global", "local"], 2]],
        window_size=9,
    ),
    "xglm": lambda: XGLMConfig(
        vocab_size=128,
        d_model=64,
        ffn_dim=96,
        num_layers=3,
        attention_heads=4,
        max_position_embeddings=512,
    ),
    "nemotron": lambda: NemotronConfig(**SMALL, **_HEADS),
    "hunyuan_v1_moe": lambda: HunYuanMoEV1Config(**SMALL, **_HEADS, num_experts=4, moe_topk=2),
}


def build_model(config: Any, scale: float = 3.0) -> PreTrainedModel:
    """A random model, the same at every call; scaled, so that it does not repeat one token."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return model


@cache
def make_prompts() -> list[tuple[int, ...]]:
    """Prompts of 1 to 50 tokens, of which half have a common prefix."""
    rng = random.Random(1)
    beginning = [rng.randrange(3, 128) for _ in range(30)]
    return [
        tuple(
            (beginning[: rng.randrange(8, 30)] if index % 2 else [])
            + [rng.randrange(3, 128) for _ in range(rng.randrange(1, 20))]
        )
        for index in range(9)
    ]


def continuation(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """The greedy continuation of a prompt by transformers, whatever ends a text."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [*map(int, output[0, len(prompt) :])]


@cache
def generate(name: str) -> list[list[int]]:
    """The greedy continuations of the prompts by transformers, one prompt at a time."""
    model = build_model({**ARCHITECTURES, **PECULIAR}[name]())
    return [continuation(model, prompt, NUM_NEW_TOKENS) for prompt in make_prompts()]
