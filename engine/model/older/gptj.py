"""GPT-J's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gptj.modeling_gptj import GPTJAttention

from ...attention.names import uses_ours
from .interface import attend


class InterfacedGPTJAttention(GPTJAttention):
    """A layer of GPT-J."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        if not uses_ours(self):
            own: Any = GPTJAttention._attn
            return own(self, query, key, value, attention_mask)
        return attend(self, query, key, value, 1 / self.scale_attn).transpose(1, 2), None


CLASSES: dict[type, type] = {GPTJAttention: InterfacedGPTJAttention}
