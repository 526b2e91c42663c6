"""Runs the model: packed tokens in, logits out. All state is in the KV cache and the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kv_cache import KVCache
from ..attention.paged import AttentionBackend
from ..batch import ModelInput
from ..recurrent.layer_state import StatePool
from ..recurrent.recurrence import StepStates
from .loaded import LoadedModel


class ModelRunner:
    """One model with its cache.

    Args:
        loaded: the model.
        cache: the KV cache.
        backend: computes attention.
        pool: the states that some models keep beside the cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KVCache,
        backend: AttentionBackend,
        pool: StatePool | None = None,
    ) -> None:
        self.device = loaded.device
        self.cache = cache
        self.backend = backend
        self.pool = pool
        self._loaded = loaded

    @torch.inference_mode()
    def forward(self, batch: ModelInput) -> Tensor:
        """Computes all tokens of a step.

        Returns:
            Logits [num_rows, vocab_size] in the model's own dtype, one row for each of
            `batch.logits_rows`.
        """
        return self._loaded.logits(
            batch.input_ids,
            batch.positions,
            self.cache.layers,
            batch.attention,
            self.backend,
            batch.logits_rows,
            StepStates.of(self.pool, batch.states),
            batch.images,
        )
