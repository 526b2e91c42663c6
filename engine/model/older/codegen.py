"""CodeGen's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from ...attention.names import uses_ours
from .interface import attend


class InterfacedCodeGenAttention(CodeGenAttention):
    """A layer of CodeGen."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        if not uses_ours(self):
            own: Any = CodeGenAttention._attn
            return own(self, query, key, value, attention_mask)
        query, key = query.to(value.dtype), key.to(value.dtype)  # its rotation is in fp32
        return attend(self, query, key, value, 1 / self.scale_attn).transpose(1, 2), None


CLASSES: dict[type, type] = {CodeGenAttention: InterfacedCodeGenAttention}
