"""XGLM's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.xglm.modeling_xglm import XGLMAttention

from ...attention.names import uses_ours
from .interface import attend


class InterfacedXGLMAttention(XGLMAttention):
    """A layer of XGLM."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **options: Any
    ) -> Any:
        """Returns the layer's attention [1, tokens, hidden size], and no weights."""
        if not uses_ours(self):
            return XGLMAttention.forward(self, hidden_states, **options)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = attend(self, query, key, value, self.scaling)
        return self.out_proj(output.flatten(2)), None


CLASSES: dict[type, type] = {XGLMAttention: InterfacedXGLMAttention}
