"""Random batches for attention kernels: queries, a paged cache in a random order, block tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.shapes import KernelShape
from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.paged import AttentionBackend, ReferenceAttention, RotaryBackend

BLOCK_SIZE = 16  # tokens


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The arguments of an attention call; unused slots of the caches hold NaN.

    `key` and `value` are those of the step's own tokens, `slots` where they go.
    """

    shape: KernelShape
    query: Tensor
    key: Tensor
    value: Tensor
    caches: tuple[Tensor, Tensor]
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    slots: Tensor
    sinks: Tensor | None
    window: int

    def attend(self, backend: AttentionBackend) -> Tensor:
        """The result of a backend, [num_tokens, heads, head_dim]."""
        return backend.paged_attention(
            self.query,
            *self.caches,
            self.block_tables,
            self.query_start_loc,
            self.context_lens,
            self.shape.head_dim**-0.5,
            sliding_window=self.window or None,
            sinks=self.sinks,
        )

    def written(self, backend: AttentionBackend) -> Tensor:
        """The keys and values of this step's slots, after a backend has written them."""
        backend.write_kv(self.key, self.value, *self.caches, self.slots)
        return self._stored()

    def rotated(self, backend: RotaryBackend | None) -> Tensor:
        """The rotated query, and the keys and values as stored; by torch without a backend."""
        angles = torch.arange(len(self.query), device=self.query.device)[:, None] * torch.linspace(
            1.0, 0.01, self.shape.head_dim // 2, device=self.query.device
        )
        cos, sin = (f(angles).repeat(1, 2).to(self.query.dtype) for f in (torch.cos, torch.sin))
        if backend is not None:
            query = backend.rotary_write_kv(
                self.query, self.key, self.value, cos, sin, *self.caches, self.slots
            )
            return torch.cat([query.flatten(1), self._stored()], 1)
        query, key = (_rotate(x, cos, sin) for x in (self.query, self.key))
        ReferenceAttention().write_kv(key, self.value, *self.caches, self.slots)
        return torch.cat([query.flatten(1), self._stored()], 1)

    def _stored(self) -> Tensor:
        blocks, offsets = self.slots // BLOCK_SIZE, self.slots % BLOCK_SIZE
        states = [cache[blocks, offsets].flatten(1) for cache in self.caches]
        return torch.cat(states, 1).to(self.query.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)


def made(
    shape: KernelShape,
    sequences: list[tuple[int, int]],
    window: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> AttentionBatch:
    """A random batch, the same at every call.

    Args:
        shape: heads and their size.
        sequences: query tokens and context of each.
        window: of the attention; 0 for none.
        dtypes: of the queries, and of the cache.
        device: where everything is.
    """
    torch.manual_seed(0)
    dtype, cache_dtype = dtypes
    counts = [-(-context // BLOCK_SIZE) for _, context in sequences]
    layer = LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim)
    cache = KVCache({0: layer}, sum(counts) + 1, BLOCK_SIZE, cache_dtype, device).layers[0]
    order = (torch.randperm(sum(counts)) + 1).split(counts)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, blocks in zip(tables, order, strict=True):
        row[: len(blocks)] = blocks
    contexts = torch.tensor([context for _, context in sequences])
    _fill(cache, tables, contexts, dtype)
    starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0)
    num_tokens = int(starts[-1])
    random = [
        torch.randn(heads, num_tokens, shape.head_dim, device=device).to(dtype).transpose(0, 1)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    return AttentionBatch(
        shape,
        *random,
        cache,
        tables.to(device),
        starts.int().to(device),
        contexts.int().to(device),
        _slots(sequences, tables).to(device),
        torch.randn(shape.heads, device=device).to(dtype) if shape.has_sinks else None,
        window,
    )


def _fill(
    caches: tuple[Tensor, Tensor], tables: Tensor, contexts: Tensor, dtype: torch.dtype
) -> None:
    """Random keys and values in all slots that sequences use, and NaN in the others."""
    slots = torch.cat(
        [_slots([(int(n), int(n))], row[None]) for n, row in zip(contexts, tables, strict=True)]
    )
    for states in caches:
        states.fill_(float("nan"))
    key, value = (torch.randn(len(slots), *states.shape[2:]) for states in caches)
    device = caches[0].device
    ReferenceAttention().write_kv(
        key.to(device, dtype), value.to(device, dtype), *caches, slots.to(device)
    )


def _slots(sequences: list[tuple[int, int]], tables: Tensor) -> Tensor:
    """Int64 [num_tokens]: the slots of the query tokens, the last ones of each context."""
    found = []
    for (queries, context), row in zip(sequences, tables, strict=True):
        positions = torch.arange(context - queries, context)
        found.append(row[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE)
    return torch.cat(found)
