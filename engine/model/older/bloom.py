"""BLOOM's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomModel,
    build_alibi_tensor,
)

from ...attention.linear_bias import LinearBias
from ...attention.names import uses_ours
from .interface import attend


class InterfacedBloomAttention(BloomAttention):
    """A layer of BLOOM, which has its bias itself where its attention is ours."""

    linear_bias: LinearBias

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor, **options: Any
    ) -> Any:
        """Returns the layer's attention and the residual [1, tokens, hidden size], no weights."""
        if not uses_ours(self):
            return BloomAttention.forward(self, hidden_states, residual, **options)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output = attend(self, query, key, value, self.inv_norm_factor, linear_bias=self.linear_bias)
        return self.dense(output.flatten(2)) + residual, None


class InterfacedBloomModel(BloomModel):  # type: ignore[no-untyped-call]
    """The layers of BLOOM; with attention of ours it makes them no bias, and no mask."""

    def forward(self, input_ids: Any, **options: Any) -> Any:
        """Returns what the last layer computes, normed [1, tokens, hidden size]."""
        if not uses_ours(self):
            return BloomModel.forward(self, input_ids, **options)
        states = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        for block in self.h:
            states, _ = block(states, alibi=None, attention_mask=None)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(states))


CLASSES: dict[type, type] = {
    BloomAttention: InterfacedBloomAttention,
    BloomModel: InterfacedBloomModel,
}


def linear_bias(model: PreTrainedModel) -> LinearBias:
    """The bias of BLOOM's heads: its slopes are what the model adds for the key at position 1."""
    mask = torch.ones(1, 2, dtype=torch.long, device=model.device)
    added = build_alibi_tensor(mask, model.config.n_head, torch.float32)
    return LinearBias(added[:, 0, 1].contiguous())
