"""Runs the model: packed tokens in, logits out. All state is in the KV cache and the pool."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..attention.kv_cache import KVCache
from ..attention.paged import AttentionBackend
from ..batch.model_input import ModelInput
from ..recurrent.layer_state import StatePool
from ..recurrent.recurrence import StepStates
from .loaded import LoadedModel

logger = logging.getLogger(__name__)


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

        Raises:
            OutOfMemoryError: the device has too little memory, even without what torch keeps of it.
        """
        try:
            return self._logits(batch)
        except torch.OutOfMemoryError:
            has_new_states = self.pool is not None  # some layers' are those after the step already
            if has_new_states or _is_recording():
                raise
        # Enough is free by the sizes that were measured at the start, but in pieces. Outside of
        # `except`, since the error keeps the tensors of the failed pass alive.
        logger.warning("out of memory: a step is computed again after torch gave its pieces back")
        torch.cuda.empty_cache()
        return self._logits(batch)

    def _logits(self, batch: ModelInput) -> Tensor:
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


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
