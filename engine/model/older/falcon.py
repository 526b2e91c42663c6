"""Falcon's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    FalconLinear,
    FalconModel,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from ...attention.linear_bias import LinearBias
from ...attention.names import uses_ours
from .interface import attend


class InterfacedFalconAttention(FalconAttention):
    """A layer of any Falcon: with one key, with a key per query, or per group.

    It rotates query and key, or has a bias by positions (ALiBi).
    """

    linear_bias: LinearBias | None

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **options: Any
    ) -> Any:
        """Returns the layer's attention [1, tokens, hidden size], and no weights."""
        if not uses_ours(self):
            return FalconAttention.forward(self, hidden_states, **options)
        fused = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:  # each key's queries, the key and the value
            groups = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
            parts = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        else:
            parts = self._split_heads(fused)
        query, key, value = (part.transpose(1, 2) for part in parts)
        if self.linear_bias is None:
            cos, sin = options["position_embeddings"]
            query, key = apply_rotary_pos_emb(query, key, cos, sin)  # type: ignore[no-untyped-call]
        output = attend(self, query, key, value, self.inv_norm_factor, linear_bias=self.linear_bias)
        return self.dense(output.flatten(2)), None


class InterfacedFalconModel(FalconModel):  # type: ignore[no-untyped-call]
    """The layers of a Falcon, which have their bias themselves where their attention is ours."""

    @property
    def use_alibi(self) -> bool:  # type: ignore[override]
        """Whether the model makes a bias for its layers; in its own class it is an attribute."""
        return bool(self.config.alibi) and not uses_ours(self)


CLASSES: dict[type, type] = {
    FalconAttention: InterfacedFalconAttention,
    # the same, but for a rounding before the bias; as such it can be quantised and packed
    FalconLinear: nn.Linear,
    FalconModel: InterfacedFalconModel,
}


def linear_bias(model: PreTrainedModel) -> LinearBias | None:
    """The bias of a Falcon's heads, which is rounded, and scaled as the logits; None if it rotates.

    Its slopes are what the model adds for the key at position 1.
    """
    config = model.config
    if not config.alibi:
        return None
    mask = torch.ones(1, 2, dtype=torch.long, device=model.device)
    added = build_alibi_tensor(mask, config.num_attention_heads, torch.float32)
    return LinearBias(added[:, 0, 1].contiguous(), config.head_dim**-0.5)
