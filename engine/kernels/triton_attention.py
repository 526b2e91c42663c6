"""Attention on GPUs: chooses sizes and starts the Triton programs, without waiting for the device.

What depends on the batch's contents (lengths, tables, slots) is read by the programs themselves;
the grid depends on shapes alone. So a decode step can be captured in a CUDA graph, where a row of
padding is a sequence with a context of 0 and a negative slot.

The sizes below are unmeasured: they follow from what fits into shared memory and registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kv_cache import largest_value

from . import triton_paged, triton_store

MAX_HEAD_DIM = 256

_LEAST_SPLIT = 256  # keys of a split; more, in contexts that would have more splits than this:
_DECODE_SPLITS, _MIXED_SPLITS = 32, 8  # powers of 2; each takes memory, for all rows of a step
_DECODE_ROWS = 16  # the least that tensor cores take
_MIXED_ROWS = 32  # leaves room for guessed tokens
_TILE_BYTES = 16_384  # of keys, and of values, that a program has at hand at a time


class TritonAttention:
    """Triton kernels behind the seam of `engine.attention.AttentionBackend`.

    They take fp32, bf16 and fp16, caches in these or in 8-bit formats, any block size, and head
    sizes up to `MAX_HEAD_DIM`, if the elements of a head lie side by side.
    """

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """See `AttentionBackend.write_kv`. Negative slots are skipped."""
        _check_heads(key, value, key_cache, value_cache)
        triton_store.write_kv[(key.shape[0],)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            **_store_constants(key, value, key_cache),
            num_warps=4,
        )

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
        """See `RotaryBackend.rotary_write_kv`. Tokens with a negative slot are not stored."""
        _check_heads(query, key, value, cos, sin, key_cache, value_cache)
        half = cos.shape[1] // 2
        output = query.new_empty(query.shape)
        triton_store.rotary_write_kv[(query.shape[0],)](
            output,
            query,
            key,
            value,
            cos,
            sin,
            key_cache,
            value_cache,
            slot_mapping,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            QUERY_HEADS=query.shape[1],
            QUERY_HEAD_LANES=triton.next_power_of_2(query.shape[1]),
            **_store_constants(key, value, key_cache),
            HALF=half,
            HALF_LANES=triton.next_power_of_2(half),
            num_warps=4,
        )
        return output

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
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.paged_attention`.

        As many query tokens as sequences count as a decode step, in which row i is sequence i's.
        """
        _check_heads(query, key_cache, value_cache)
        call = _Call(
            query,
            key_cache,
            value_cache,
            block_tables,
            query_start_loc,
            context_lens,
            scale * math.log2(math.e),
            sliding_window or 0,
            softcap or 0.0,
            sinks,
        )
        shape = (*query.shape[:2], value_cache.shape[3])
        if call.is_decode:
            output = query.new_empty(shape)
            _attend_splits(call, output, _power_of_2(call.group, _DECODE_ROWS))
        else:
            output = query.new_zeros(shape)  # rows that no sequence owns
            split_rows = _power_of_2(call.group, _MIXED_ROWS)
            _attend_splits(call, output, split_rows)
            _attend_tiles(call, output, split_rows)
        return output


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one attention call; `scale` has a factor of log2(e), 0 stands for none."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None

    @property
    def num_seqs(self) -> int:
        """Sequences, those of padding included."""
        return self.block_tables.shape[0]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one query token."""
        return self.query.shape[0] == self.num_seqs

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.key_cache.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[1] // self.kv_heads

    @property
    def value_lanes(self) -> int:
        """The head size of values, as a power of 2 that tensor cores take."""
        return _power_of_2(self.value_cache.shape[3], 16)

    @property
    def key_lanes(self) -> int:
        """The head size of keys, as a power of 2 that tensor cores take."""
        return _power_of_2(self.key_cache.shape[3], 16)

    @property
    def tile(self) -> int:
        """Keys at hand at a time."""
        row_bytes = max(self.key_lanes, self.value_lanes) * self.query.element_size()
        return min(max(_TILE_BYTES // row_bytes, 16), 64)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of query, key cache and value cache, in the order in which the programs take them."""
        return (
            self.block_tables.stride(0),
            *self.query.stride()[:2],
            *self.key_cache.stride()[:3],
            *self.value_cache.stride()[:3],
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What both attention programs are compiled for."""
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "BLOCK_SIZE": self.key_cache.shape[1],
            "KEY_DIM": self.key_cache.shape[3],
            "VALUE_DIM": self.value_cache.shape[3],
            "KEY_LANES": self.key_lanes,
            "VALUE_LANES": self.value_lanes,
            "TILE": self.tile,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "HAS_SINKS": self.sinks is not None,
        }

    @property
    def max_splits(self) -> int:
        """The most splits of a sequence, whatever its context."""
        return _DECODE_SPLITS if self.is_decode else _MIXED_SPLITS

    def num_splits(self, rows: int) -> int:
        """The splits that any sequence may need."""
        bound = self.block_tables.shape[1] * self.key_cache.shape[1]
        if self.window:  # what the rows of a sequence see, from the edge of a split on
            bound = min(bound, self.window + rows // self.group + _LEAST_SPLIT)
        return min(-(-bound // _LEAST_SPLIT), self.max_splits)


def _attend_splits(call: _Call, output: Tensor, rows: int) -> None:
    """Computes the sequences whose query tokens fit into a program's rows."""
    num_splits = call.num_splits(rows)
    part_rows = call.group if call.is_decode else rows
    is_whole = num_splits == 1
    parts = largest = total = None
    if not is_whole:
        shape = (call.num_seqs, call.kv_heads, part_rows, num_splits)
        parts, largest, total = (
            call.query.new_empty(*shape, *last, dtype=torch.float32)
            for last in ((call.value_cache.shape[3],), (), ())
        )
    triton_paged.attend_splits[(call.num_seqs, call.kv_heads, num_splits)](
        output,
        parts,
        largest,
        total,
        call.query,
        call.key_cache,
        call.value_cache,
        call.block_tables,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        call.scale,
        num_splits,
        *call.strides,
        **call.constants,
        ROWS=rows,
        PART_ROWS=part_rows,
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=call.max_splits,
        IS_DECODE=call.is_decode,
        IS_WHOLE=is_whole,
        num_warps=4,
        num_stages=2,
    )
    if is_whole:
        return
    triton_paged.merge_splits[(call.num_seqs, part_rows, call.kv_heads)](
        output,
        parts,
        largest,
        total,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        num_splits,
        KV_HEADS=call.kv_heads,
        GROUP=call.group,
        VALUE_DIM=call.value_cache.shape[3],
        VALUE_LANES=call.value_lanes,
        ROWS=rows,
        PART_ROWS=part_rows,
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=call.max_splits,
        WINDOW=call.window,
        HAS_SINKS=call.sinks is not None,
        IS_DECODE=call.is_decode,
        num_warps=4,
    )


def _attend_tiles(call: _Call, output: Tensor, split_rows: int) -> None:
    """Computes the sequences that have more query tokens than `split_rows` has room for."""
    is_wide = max(call.key_lanes, call.value_lanes) > 128
    rows = 32 if call.query.element_size() > 2 else 64 if is_wide else 128
    rows = _power_of_2(call.group, rows)
    num_tiles = call.query.shape[0] // (rows // call.group) + call.num_seqs
    triton_paged.attend_tiles[(num_tiles, call.kv_heads)](
        output,
        call.query,
        call.key_cache,
        call.value_cache,
        call.block_tables,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        call.scale,
        call.num_seqs,
        *call.strides,
        **call.constants,
        ROWS=rows,
        SPLIT_ROWS=split_rows,
        num_warps=8 if rows >= 128 else 4,
        num_stages=2,
    )


def _store_constants(key: Tensor, value: Tensor, key_cache: Tensor) -> dict[str, Any]:
    """What both storing programs are compiled for."""
    (_, num_heads, key_dim), value_dim = key.shape, value.shape[2]
    return {
        "HEADS": num_heads,
        "HEAD_LANES": triton.next_power_of_2(num_heads),
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_LANES": triton.next_power_of_2(key_dim),
        "VALUE_LANES": triton.next_power_of_2(value_dim),
        "BLOCK_SIZE": key_cache.shape[1],
        "LARGEST": largest_value(key_cache.dtype) or 0.0,
    }


def _power_of_2(number: int, least: int) -> int:
    """The next power of 2, but not less than `least`, which is one."""
    return max(least, int(triton.next_power_of_2(number)))


def _check_heads(*tensors: Tensor) -> None:
    """The programs take any strides but this one.

    Raises:
        ValueError: the elements of a head do not lie side by side.
    """
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the elements of a head must lie side by side")
