"""An adapter as it was read: a low-rank update for each linear layer that it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LowRankUpdate(NamedTuple):
    """What is added to the weight [out, in] of a layer: up @ down.

    `down` is [rank, in] and `up` [out, rank], both float32; the adapter's scale is in `up`.
    """

    down: Tensor
    up: Tensor

    def rounded(self, dtype: torch.dtype) -> LowRankUpdate:
        """The same with each number rounded to a format, still in float32."""
        return LowRankUpdate(self.down.to(dtype).float(), self.up.to(dtype).float())


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A named set of updates.

    Attributes:
        name: by which requests choose it.
        digest: sha-256 of what it was read from: equal for equal adapters alone.
        updates: by the name of the layer in the model as transformers builds it.
    """

    name: str
    digest: bytes
    updates: dict[str, LowRankUpdate]
