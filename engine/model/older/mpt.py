"""MPT's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.mpt.modeling_mpt import (
    MptAttention,
    MptModel,
    build_mpt_alibi_tensor,
)

from ...attention.linear_bias import LinearBias
from ...attention.names import uses_ours
from .interface import attend


class InterfacedMptAttention(MptAttention):
    """A layer of MPT, which has its bias itself where its attention is ours."""

    linear_bias: LinearBias

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_bias: Any, **options: Any
    ) -> Any:
        """Returns the layer's attention [1, tokens, hidden size], and no weights."""
        if not uses_ours(self):
            return MptAttention.forward(self, hidden_states, position_bias, **options)
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        parts = fused.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        scale: Any = self.softmax_scale  # 1 / sqrt(head size), if the configuration has none
        output = attend(self, query, key, value, scale, linear_bias=self.linear_bias)
        return self.out_proj(output.flatten(2)), None


class InterfacedMptModel(MptModel):  # type: ignore[no-untyped-call]
    """The layers of MPT; with attention of ours it makes them no bias, and no mask."""

    def forward(self, input_ids: Any, **options: Any) -> Any:
        """Returns what the last layer computes, normed [1, tokens, hidden size]."""
        if not uses_ours(self):
            return MptModel.forward(self, input_ids, **options)
        states = self.wte(input_ids)
        for block in self.blocks:
            states, _ = block(states, position_bias=None, attention_mask=None)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm_f(states))


CLASSES: dict[type, type] = {MptAttention: InterfacedMptAttention, MptModel: InterfacedMptModel}


def linear_bias(model: PreTrainedModel) -> LinearBias:
    """The bias of MPT's heads: its slopes are what the model adds for the last key but one."""
    added = build_mpt_alibi_tensor(  # type: ignore[no-untyped-call]
        model.config.n_heads, 2, device=model.device
    )
    return LinearBias(-added[:, 0, 0].contiguous())
