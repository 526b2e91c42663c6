"""The attention layers of Falcon without ALiBi, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from ..attention.names import uses_ours
from .older_attention import attend


class InterfacedFalconAttention(FalconAttention):
    """A layer of any Falcon that rotates: with one key, with a key per query, or per group."""

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
        cos, sin = options["position_embeddings"]
        query, key = apply_rotary_pos_emb(query, key, cos, sin)  # type: ignore[no-untyped-call]
        output = attend(self, query, key, value, self.inv_norm_factor)
        return self.dense(output.flatten(2)), None
