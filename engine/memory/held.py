"""What this process keeps in the device's memory for as long as it runs: weights and KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from ..attention.kv_cache import KVCache
from ..protocol.config import RankMemory


def held_by(model: nn.Module, cache: KVCache) -> RankMemory:
    """The bytes of a model's weights, each counted once, and of its cache; without adapters."""
    weights = chain(model.parameters(), model.buffers())
    return RankMemory(
        _bytes((tensor.data_ptr(), tensor.nbytes) for tensor in weights),
        # Layers may share their memory (`KVCache`), which is counted once.
        _bytes(
            (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            for tensor in _of(cache)
        ),
    )


def _of(cache: KVCache) -> Iterable[Tensor]:
    return chain.from_iterable(cache.layers.values())


def _bytes(pieces: Iterable[tuple[int, int]]) -> int:
    return sum(size for _, size in set(pieces))
