"""The positions of a step's tokens, for models that derive them from the length of their cache.

Such a model takes the tokens of a step for those that follow the cached ones of a single sequence.
Here they are of many sequences, and the cache is not the model's: it gets an object that looks like
its cache, and whose length is a tensor, so that the model's own sum gives the right positions.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_QUESTION = "get_seq_length"


class StepPositions:
    """Looks like a cache of transformers in which no key or value is kept."""

    def __init__(self, positions: Tensor) -> None:
        """Take the positions int64 [num_tokens] of a step."""
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, _layer_index: int = 0) -> Tensor:
        """Return int64 [num_tokens], which a model adds to 0 … num_tokens - 1."""
        return self._offsets

    def update(
        self, key: Tensor, value: Tensor, _layer_index: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return key and value as they are: attention writes them into the paged cache."""
        return key, value


def asks_positions(model: nn.Module) -> bool:
    """Whether an attention layer of a model asks its cache for its length."""
    return any(_asks(module) for module in model.modules())


def _asks(module: nn.Module) -> bool:
    forward = type(module).forward
    return (
        hasattr(module, "layer_idx")
        and isinstance(forward, FunctionType)
        and _QUESTION in forward.__code__.co_names
    )
