"""Models of real shapes with random weights, and a tokenizer; speed depends on the shape only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 32_000


def llama_125m() -> LlamaConfig:
    """124 M parameters: 12 layers, 12 heads (4 for keys and values) of 64, untied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,  # so that generation always runs to its limit
        pad_token_id=0,
    )


def llama_8b() -> LlamaConfig:
    """The shape of Llama-3.1-8B: 32 layers, 32 heads (8 for keys and values) of 128."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def qwen3_06b() -> Qwen3Config:
    """The shape of Qwen3-0.6B: 28 layers, 16 heads (8 for keys and values) of 128, tied."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def qwen3_moe_192m() -> Qwen3MoeConfig:
    """192 M parameters, 170 M of them in 6 layers of 32 experts, of which a token takes 4."""
    return Qwen3MoeConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=384,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def shrunk(config: Any) -> Any:
    """Shrinks a configuration to a size for tests; it is changed in place."""
    config.vocab_size = 512
    config.hidden_size = 64
    config.intermediate_size = 128
    config.num_hidden_layers = 2
    config.num_attention_heads = 4
    config.num_key_value_heads = 2
    config.head_dim = 16
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = 64
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Makes the model on its device, without writing or copying weights."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def save(config: Any, path: Path) -> Any:
    """Writes a model and a tokenizer in which token i is the word `wi`; returns the model."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return model


def prompt(length: int, salt: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Random token ids; prompts of different salts share no prefix."""
    generator = torch.Generator().manual_seed(salt)
    return torch.randint(2, vocab_size, (length,), generator=generator).tolist()
