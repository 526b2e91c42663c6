"""The least that a step must read and compute, for a model of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Bytes and floating-point operations.

    Attributes:
        weight_bytes: weights that every step reads once: all but the input embedding, of which only
            single rows are read. A tied embedding counts as the output layer.
        kv_bytes_per_token: keys and values of one token in all layers.
        flops_per_token: linear layers for one token, without the output layer.
        head_flops: the output layer for one row of logits.
        flops_per_pair: attention of one query token to one key token in all layers.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    head_flops: int
    flops_per_pair: int

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that a step of `batch` rows reads, with `context` tokens before each row."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token

    def decode_flops(self, batch: int, context: float) -> float:
        """Floating-point operations of the same step."""
        row = self.flops_per_token + self.head_flops + context * self.flops_per_pair
        return batch * row

    def prefill_flops(self, prompts: Sequence[int]) -> float:
        """Operations for prompts of these lengths, each with logits for its last token only."""
        pairs = sum(length * (length + 1) // 2 for length in prompts)
        return (
            sum(prompts) * self.flops_per_token
            + len(prompts) * self.head_flops
            + pairs * self.flops_per_pair
        )


def costs(config: Any, dtype: torch.dtype) -> ModelCosts:
    """Counts a model's costs from its shape; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    layers = total - embedding.numel() - (0 if head is embedding else head.numel())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer = config.num_key_value_heads * head_dim
    return ModelCosts(
        weight_bytes=(layers + head.numel()) * dtype.itemsize,
        kv_bytes_per_token=2 * config.num_hidden_layers * per_layer * dtype.itemsize,
        flops_per_token=2 * layers,
        head_flops=2 * head.numel(),
        flops_per_pair=4 * config.num_hidden_layers * config.num_attention_heads * head_dim,
    )
