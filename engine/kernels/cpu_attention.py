"""Attention over the paged KV cache by C kernels, and what writes it.

The cache is logically [num_blocks, block_size, num_kv_heads, head_size], fp32; any strides will do
as long as a head row is contiguous.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..attention.linear_bias import LinearBias
from .addresses import flat, head_rows
from .cpu_library import CpuLibrary
from .kernel import FLOAT, INT, POINTER, SIZE

# Of cos and sin: their addresses, the stride of their rows, and how many elements of a head rotate.
_Rotation = tuple[int | None, int | None, int, int]
_NO_ROTATION: _Rotation = (None, None, 0, 0)
# Of a linear bias: the address of its slopes, and the scale of a rounded one; 0 for an exact one.
_Bias = tuple[int | None, float]
_NO_BIAS: _Bias = (None, 0.0)


class AttentionKernels(CpuLibrary):
    """Keys and values into the cache, rotated or not, and attention over it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._rotate_query = self._kernel(
            "rotate_query",
            *(POINTER, SIZE, SIZE),
            *(POINTER, POINTER, SIZE, SIZE),
            *(POINTER, SIZE, SIZE, SIZE, INT),
        )
        self._rotate_write_kv = self._kernel(
            "rotate_write_kv",
            *(POINTER, POINTER, SIZE, SIZE, SIZE, SIZE),
            *(POINTER, POINTER, SIZE, SIZE),
            *(POINTER, POINTER, SIZE, SIZE, SIZE),
            *(POINTER, SIZE, SIZE, SIZE, SIZE, INT),
        )
        self._attention = self._kernel(
            "paged_attention",
            *(POINTER, POINTER, SIZE, SIZE),
            *(POINTER, POINTER, SIZE, SIZE, SIZE),
            *(POINTER, SIZE, POINTER, POINTER),
            *(SIZE, SIZE, SIZE, SIZE, SIZE),
            *(FLOAT, SIZE, SIZE, FLOAT, POINTER, POINTER, FLOAT, INT),
        )

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Store key and value rows [T, Hkv, D] in their slots; negative slots are skipped."""
        self._store(key, value, _NO_ROTATION, key_cache, value_cache, slot_mapping)

    def rotary_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """See `RotaryBackend.rotary_write_kv`."""
        num_tokens, _, head_size = key.shape
        if query.shape[::2] != key.shape[::2]:
            raise ValueError("query and key differ in rows or in size")
        rotation = _rotation(cos, sin, num_tokens, head_size)
        self._store(key, value, rotation, key_cache, value_cache, slot_mapping)
        output = query.new_empty(query.shape)
        self._rotate_query(
            head_rows(query),
            query.stride(0),
            query.stride(1),
            *rotation,
            output.data_ptr(),
            num_tokens,
            query.shape[1],
            head_size,
            torch.get_num_threads(),
        )
        return output

    def _store(
        self,
        key: Tensor,
        value: Tensor,
        rotation: _Rotation,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Check the arguments, and store keys, rotated, and values."""
        block, token, head = _cache_strides(key_cache, value_cache)
        num_tokens, num_kv_heads, head_size = key.shape
        if key.shape != value.shape or slot_mapping.numel() != num_tokens:
            raise ValueError("key, value and slot_mapping disagree on the number of rows")
        if key_cache.shape[2:] != key.shape[1:]:
            raise ValueError("key does not fit the cache")
        self._rotate_write_kv(
            head_rows(key),
            head_rows(value),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            *rotation,
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            block,
            token,
            head,
            flat(slot_mapping, torch.int64),
            num_tokens,
            num_kv_heads,
            head_size,
            key_cache.shape[1],
            torch.get_num_threads(),
        )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start_loc: Tensor,
        context_lens: Tensor,
        scale: float,
        *,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        linear_bias: LinearBias | None = None,
    ) -> Tensor:
        """See `AttentionBackend.paged_attention`. Key and value have the same head size."""
        block, token, head = _cache_strides(key_cache, value_cache)
        num_tokens, num_heads, head_size = query.shape
        num_seqs, num_kv_heads = context_lens.numel(), key_cache.shape[2]
        if key_cache.shape[3] != head_size or head_size > self.max_head_size:
            raise ValueError(f"head size {head_size} does not fit")
        if num_heads % num_kv_heads:
            raise ValueError("query heads are not a multiple of key heads")
        if block_tables.shape[0] != num_seqs or query_start_loc.numel() != num_seqs + 1:
            raise ValueError("block_tables, query_start_loc and context_lens disagree")
        if sinks is not None and sinks.numel() != num_heads:
            raise ValueError("one sink per query head expected")
        slopes, rounded_scale = _NO_BIAS if linear_bias is None else _bias(linear_bias, num_heads)
        output = query.new_empty(num_tokens, num_heads, head_size)
        self._attention(
            output.data_ptr(),
            head_rows(query),
            query.stride(0),
            query.stride(1),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            block,
            token,
            head,
            flat(block_tables, torch.int32),
            block_tables.shape[1],
            flat(query_start_loc, torch.int32),
            flat(context_lens, torch.int32),
            num_seqs,
            num_heads,
            num_kv_heads,
            head_size,
            key_cache.shape[1],
            scale,
            sliding_window or 0,
            chunk_size or 0,
            softcap or 0.0,
            None if sinks is None else flat(sinks, torch.float32),
            slopes,
            rounded_scale,
            torch.get_num_threads(),
        )
        return output


def _rotation(cos: Tensor, sin: Tensor, num_tokens: int, head_size: int) -> _Rotation:
    """Check and describe cos and sin [num_tokens, rotary]."""
    rotary = cos.shape[-1]
    shape = (num_tokens, rotary)
    if cos.shape != shape or sin.shape != shape or rotary > head_size or rotary % 2:
        raise ValueError("cos and sin do not fit the heads")
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise ValueError("cos and sin must be laid out alike, in contiguous rows")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError("expected fp32 cos and sin")
    return cos.data_ptr(), sin.data_ptr(), cos.stride(0), rotary


def _cache_strides(key_cache: Tensor, value_cache: Tensor) -> tuple[int, int, int]:
    """Check the caches and return the strides of their blocks, tokens and heads."""
    strides = key_cache.stride()
    if strides != value_cache.stride() or key_cache.shape != value_cache.shape:
        raise ValueError("key and value cache differ in layout")
    if strides[3] != 1 or key_cache.dtype != torch.float32 or value_cache.dtype != torch.float32:
        raise ValueError("the cache must be fp32 with contiguous head rows")
    return strides[0], strides[1], strides[2]


def _bias(linear_bias: LinearBias, num_heads: int) -> _Bias:
    """Check that there is a slope per head, and return what the kernel takes."""
    if linear_bias.slopes.numel() != num_heads:
        raise ValueError("one slope per query head expected")
    return flat(linear_bias.slopes, torch.float32), linear_bias.rounded_scale or 0.0
