"""The linear attention of MiniMax-Text-01 by the CPU kernel that goes from token to token.

transformers computes a text's first tokens in blocks, with products of torch's, and later ones one
by one. It has no function for either, so the layer's forward is written here once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cpu import CpuKernels

_PARTS = ("qkv_proj", "output_gate", "out_proj", "norm", "act_fn")


def takes(layer: nn.Module) -> bool:
    """Whether a layer is of this kind, and the kernel takes its heads."""
    slopes, head_dim = getattr(layer, "slope_rate", None), getattr(layer, "head_dim", None)
    has_parts = all(callable(getattr(layer, part, None)) for part in _PARTS)
    return isinstance(slopes, Tensor) and has_parts and head_dim is not None and head_dim % 4 == 0


def forward(
    kernels: CpuKernels,
    layer: Any,
    stock: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: object = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """As the layer's stock forward, which computes texts with padding."""
    if attention_mask is not None:
        return stock(hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    batch, num_tokens, _ = hidden_states.shape
    qkv = layer.act_fn(layer.qkv_proj(hidden_states)).view(batch, num_tokens, -1, 3, layer.head_dim)
    query, key, value = qkv.unbind(3)  # of each head
    state = None if past_key_values is None else past_key_values.get_linear_cache(layer.layer_idx)
    if state is None:
        state = value.new_zeros(batch, value.shape[2], layer.head_dim, layer.head_dim)
    decay = torch.exp(-layer.slope_rate).flatten().expand(batch, num_tokens, -1)
    output = layer.norm(kernels.gated_delta_rule(query, key, value, decay, None, state).flatten(2))
    output = layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * output)
    if past_key_values is not None:
        past_key_values.set_linear_cache(layer.layer_idx, state)
    return output, state
