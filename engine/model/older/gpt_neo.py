"""GPT-Neo's attention, through the attention interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from ...attention.names import uses_ours
from .interface import attend


class InterfacedGPTNeoAttention(GPTNeoSelfAttention):
    """A layer of GPT-Neo, which sees a window of the text if it is a local one."""

    @property
    def layer_idx(self) -> int:
        """The layer's index, by the name that others have for it."""
        return int(self.layer_id)

    @property
    def window(self) -> int | None:
        """How many positions a token sees, its own included; None for all."""
        return int(self.config.window_size) if self.attention_type == "local" else None

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """Bool [1, 1, positions, positions], what each sees; the model's own is computed once.

        So the check of windows, which makes them small for the moment, finds them in both.
        """
        positions = torch.arange(
            self.config.max_position_embeddings, device=self.out_proj.bias.device
        )
        distance = positions.unsqueeze(1) - positions
        return ((distance >= 0) & (distance < (self.window or len(positions))))[None, None]

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> Any:
        if not uses_ours(self):
            own: Any = GPTNeoSelfAttention._attn
            return own(self, query, key, value, attention_mask)
        output = attend(self, query, key, value, 1.0, sliding_window=self.window)
        return output.transpose(1, 2), None


CLASSES: dict[type, type] = {GPTNeoSelfAttention: InterfacedGPTNeoAttention}
