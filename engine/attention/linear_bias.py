"""ALiBi: what a model without position embeddings adds to the logits, by the positions of keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearBias:
    """A bias on the scaled logits that grows with the key's position, by a slope for each head.

    Models add slope * key position. Softmax takes no notice of what all keys of a query have in
    common, so here it is slope * (key position - query position), which keeps the precision of
    fp32 in long texts.

    Attributes:
        slopes: float32 [num_heads].
        rounded_scale: of a model that computes slope * key position in bfloat16, which is coarse
            from 256 positions on, and scales the result: the bias is
            bfloat16(slope * bfloat16(key position)) * rounded_scale.
    """

    slopes: Tensor
    rounded_scale: float | None = None

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        """Float32 [num_heads, num_queries, num_keys], of positions [num_queries] and [num_keys]."""
        slopes = self.slopes[:, None, None]
        if self.rounded_scale is None:
            return slopes * (key - query.unsqueeze(1)).float()
        rounded = (slopes.bfloat16() * key.bfloat16()).float() * self.rounded_scale
        return rounded.expand(-1, len(query), -1)
