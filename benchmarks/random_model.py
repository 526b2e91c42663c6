"""A model of a real shape with random weights, and a tokenizer for it: shape decides speed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        eos_token_id=None,  # generation always runs to its limit
        pad_token_id=0,
    )


def save(config: LlamaConfig, path: Path) -> LlamaForCausalLM:
    """Writes the model and a tokenizer whose token number i is the word `wi`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return model


def prompt(length: int, salt: int) -> list[int]:
    """A prompt that shares no beginning with those of other salts."""
    generator = torch.Generator().manual_seed(salt)
    return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
