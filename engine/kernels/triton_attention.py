"""Attention on GPUs: chooses sizes and launches the Triton kernels, without waiting for the device.

What depends on the batch's contents (lengths, tables, slots) is read by the kernels themselves; the
grid depends on shapes alone. So a decode step can be captured in a CUDA graph, where a padding row
is a sequence with a context of 0 and a negative slot.

No size here has been measured on a GPU. They follow from what fits into registers and shared
memory, also on GPUs with 99 KiB for a program (8.6, 8.9). Where a sequence is split depends on that
sequence and the model alone, so that its sums have the same order in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..attention.kv_cache import largest_value
from ..attention.linear_bias import LinearBias
from . import triton_paged, triton_store

MAX_HEAD_DIM = 576  # the latents of DeepSeek V3, with a rotated key

_LEAST_SPLIT = 128  # keys of a split; more, if a context would have too many splits otherwise
_FEWEST_SPLITS, _MOST_SPLITS = 32, 128  # bounds of a model's maximum of splits per sequence
_BUSY_SPLITS = 256  # of all key heads together: enough to keep a GPU busy with one sequence
_PARTS_BYTES = 2**20  # of partial results of a sequence's splits, unless the splits are the fewest
_SPLIT_ROWS = 32  # the most query rows of a sequence that is split: decoding, with draft tokens
_PROGRAMS_PER_UNIT = 4  # about as many programs as a multiprocessor runs at the same time
_LEAST_PROGRAMS = 4  # for the splits of a sequence, which may be much longer than the others
_WIDE_LANES, _WIDE_GROUP = 256, 16  # wider heads leave registers for so many query heads at a time
_TILE_BYTES = 16_384  # of keys, and of values, that a program processes at a time

# The addresses of keys come from the block table, so loading them in advance takes more stages.
# With 3 only the table is loaded while the previous tile is computed, with 5 also keys and values.
_STAGES, _FEWER_STAGES = 5, 3


class TritonAttention:
    """The Triton kernels as an `engine.attention.paged.AttentionBackend`.

    They take fp32, bf16 and fp16, caches in these or in 8-bit formats, any block size, and head
    sizes up to `MAX_HEAD_DIM`, if the elements of a head are contiguous.
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
        _check_heads(key, value)
        _check_caches(key_cache, value_cache)
        triton_store.write_kv[(key.shape[0],)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
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
        _check_heads(query, key, value, cos, sin)
        _check_caches(key_cache, value_cache)
        half = cos.shape[1] // 2
        output = query.new_empty(query.shape)
        triton_store.rotary_write_kv[(query.shape[0], 3)](
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
        chunk_size: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        linear_bias: LinearBias | None = None,
    ) -> Tensor:
        """See `AttentionBackend.paged_attention`.

        A batch with as many query tokens as sequences must be a decode step, in which row i is the
        token of sequence i.
        """
        _check_heads(query)
        _check_caches(key_cache, value_cache)
        call = _Call(
            query,
            key_cache,
            value_cache,
            block_tables,
            query_start_loc,
            context_lens,
            scale * math.log2(math.e),
            sliding_window or 0,
            chunk_size or 0,
            softcap or 0.0,
            sinks,
            linear_bias,
        )
        shape = (*query.shape[:2], value_cache.shape[3])
        if call.is_decode:
            output = query.new_empty(shape)
            _attend_splits(call, output)
        else:
            output = query.new_zeros(shape)  # padding rows may belong to no sequence
            _attend_splits(call, output)
            _attend_tiles(call, output)
        return output


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one attention call.

    `scale` has a factor of log2(e), since the kernels use exp2; `window`, `chunk` and `softcap` are
    0 for none.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: Tensor | None
    linear_bias: LinearBias | None = None

    @property
    def slopes(self) -> Tensor | None:
        """Of the linear bias, if there is one."""
        return None if self.linear_bias is None else self.linear_bias.slopes

    @property
    def num_seqs(self) -> int:
        """Sequences, padding rows included."""
        return self.block_tables.shape[0]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one query token."""
        return self.query.shape[0] == self.num_seqs

    @property
    def shares(self) -> int:
        """How many programs share a key head, each with a part of its query heads."""
        group = self.query.shape[1] // self.key_cache.shape[2]
        if self.lanes <= _WIDE_LANES or group <= _WIDE_GROUP:
            return 1
        return next(
            number for number in range(-(-group // _WIDE_GROUP), group + 1) if group % number == 0
        )

    @property
    def kv_heads(self) -> int:
        """The number of key heads, each counted as often as it is shared."""
        return self.key_cache.shape[2] * self.shares

    @property
    def group(self) -> int:
        """Query heads per key head, counted likewise."""
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
    def lanes(self) -> int:
        """The larger of the two."""
        return max(self.key_lanes, self.value_lanes)

    @property
    def table_and_query_strides(self) -> tuple[int, ...]:
        """Strides of block table, query tokens and query heads, as the kernels take them."""
        return self.block_tables.stride(0), *self.query.stride()[:2]

    @property
    def split_tokens(self) -> int:
        """The most query tokens of a sequence that is split."""
        rows = _SPLIT_ROWS if self.lanes <= _WIDE_LANES else _WIDE_GROUP
        return 1 if self.is_decode else max(min(rows // self.group, self.max_splits), 1)

    @property
    def max_splits(self) -> int:
        """The most splits of a sequence, times its query tokens.

        A power of 2, which depends on the model alone.
        """
        part_bytes = self.query.shape[1] * self.value_cache.shape[3] * 4
        splits = min(_BUSY_SPLITS // self.kv_heads, _PARTS_BYTES // part_bytes, _MOST_SPLITS)
        return 1 << max(splits, _FEWEST_SPLITS).bit_length() - 1

    @property
    def num_splits(self) -> int:
        """The most splits that a sequence of this batch can have."""
        bound = self.block_tables.shape[1] * self.key_cache.shape[1]
        for size in filter(None, (self.window, self.chunk)):
            # the keys that a sequence's rows see, rounded down to a split's start
            bound = min(bound, size + self.split_tokens + _LEAST_SPLIT)
        return min(-(-bound // _LEAST_SPLIT), self.max_splits)

    def tile(self, element_size: int) -> int:
        """Keys that a program processes at a time, if an element has this many bytes."""
        row_bytes = self.lanes * element_size
        return min(max(_TILE_BYTES // row_bytes, 16), 128 // element_size)

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that both attention kernels are compiled for."""
        return {
            "KV_HEADS": self.kv_heads,
            "SHARES": self.shares,
            "GROUP": self.group,
            "BLOCK_SIZE": self.key_cache.shape[1],
            "KEY_DIM": self.key_cache.shape[3],
            "VALUE_DIM": self.value_cache.shape[3],
            "KEY_LANES": self.key_lanes,
            "VALUE_LANES": self.value_lanes,
            "WINDOW": self.window,
            "CHUNK": self.chunk,
            "SOFTCAP": self.softcap,
            "HAS_SLOPES": self.linear_bias is not None,
            "ROUNDED_SCALE": (self.linear_bias and self.linear_bias.rounded_scale) or 0.0,
            "HAS_SINKS": self.sinks is not None,
        }


class _Splits(NamedTuple):
    """The bounds of splits, see `_Call`, and the memory for their partial results.

    `num_parts` is the number of partial results per key head. `values` is float32 [num_seqs,
    kv_heads, num_parts, value_dim], `largest` and `total` are float32 [num_seqs, kv_heads,
    num_parts]; all three are None if every sequence has a single split.
    """

    split_tokens: int
    num_splits: int
    max_splits: int
    num_parts: int
    values: Tensor | None = None
    largest: Tensor | None = None
    total: Tensor | None = None


def _splits(call: _Call) -> _Splits:
    split_tokens, num_splits, max_splits = call.split_tokens, call.num_splits, call.max_splits
    num_parts = call.group * (num_splits if call.is_decode else max_splits)
    if num_splits == 1:
        return _Splits(split_tokens, num_splits, max_splits, num_parts)
    shape = (call.num_seqs, call.kv_heads, num_parts)
    parts = (
        call.query.new_empty(*shape, *last, dtype=torch.float32)
        for last in ((call.value_cache.shape[3],), (), ())
    )
    return _Splits(split_tokens, num_splits, max_splits, num_parts, *parts)


def _attend_splits(call: _Call, output: Tensor) -> None:
    """Computes the sequences with few query tokens."""
    splits = _splits(call)
    rows = _power_of_2(splits.split_tokens * call.group, 16)  # the least that tensor cores take
    element_size = call.query.element_size()
    if element_size == 2:  # fp32 leaves too few registers for a converted cache
        element_size = call.key_cache.element_size()
    # A recorded step allows for the longest context, so nearly all of its splits are empty. Hence
    # there are only as many programs as the GPU runs at once; each takes several splits in turn.
    room = _PROGRAMS_PER_UNIT * _num_units(output.device) // (call.num_seqs * call.kv_heads)
    num_programs = min(splits.num_splits, max(room, _LEAST_PROGRAMS))
    triton_paged.attend_splits[(call.num_seqs, call.kv_heads, num_programs)](
        output,
        splits.values,
        splits.largest,
        splits.total,
        call.query,
        call.key_cache,
        call.value_cache,
        call.block_tables,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        call.slopes,
        call.scale,
        splits.num_parts,
        *call.table_and_query_strides,
        **call.constants,
        ROWS=rows,
        SPLIT_TOKENS=splits.split_tokens,
        TILE=call.tile(element_size),
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=splits.max_splits,
        IS_DECODE=call.is_decode,
        IS_WHOLE=splits.num_splits == 1,
        num_warps=4 if rows == 16 else 8,
        num_stages=_STAGES if rows <= 32 and call.lanes <= _WIDE_LANES else _FEWER_STAGES,
    )
    if splits.num_splits != 1:
        _merge_splits(call, output, splits)


def _merge_splits(call: _Call, output: Tensor, splits: _Splits) -> None:
    """Combines the partial results of each sequence's splits."""
    triton_paged.merge_splits[(call.num_seqs, call.group, call.kv_heads)](
        output,
        splits.values,
        splits.largest,
        splits.total,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        splits.num_parts,
        KV_HEADS=call.kv_heads,
        GROUP=call.group,
        VALUE_DIM=call.value_cache.shape[3],
        VALUE_LANES=call.value_lanes,
        SPLIT_TOKENS=splits.split_tokens,
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=splits.max_splits,
        WINDOW=call.window,
        CHUNK=call.chunk,
        HAS_SINKS=call.sinks is not None,
        IS_DECODE=call.is_decode,
        num_warps=4 if splits.max_splits == _FEWEST_SPLITS else 8,
    )


def _attend_tiles(call: _Call, output: Tensor) -> None:
    """Computes the sequences with more query tokens than those that are split."""
    num_tokens, split_tokens = call.query.shape[0], call.split_tokens
    is_wide = call.lanes > 128
    element_size = call.query.element_size()
    least = 16 if call.lanes > _WIDE_LANES else 32 if element_size > 2 else 64 if is_wide else 128
    rows = _power_of_2(call.group, least)
    most_seqs = min(call.num_seqs, num_tokens // (split_tokens + 1))
    if not most_seqs:
        return
    num_tiles = num_tokens // (rows // call.group) + most_seqs  # their last tiles are not full
    triton_paged.attend_tiles[(num_tiles, call.kv_heads)](
        output,
        call.query,
        call.key_cache,
        call.value_cache,
        call.block_tables,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        call.slopes,
        call.scale,
        call.num_seqs,
        *call.table_and_query_strides,
        **call.constants,
        ROWS=rows,
        SPLIT_TOKENS=split_tokens,
        TILE=call.tile(element_size),
        num_warps=8,
        num_stages=_FEWER_STAGES if is_wide else _STAGES,
    )


def _store_constants(key: Tensor, value: Tensor, key_cache: Tensor) -> dict[str, Any]:
    """The constants that both kernels for writing the cache are compiled for."""
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


@cache
def _num_units(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_heads(*tensors: Tensor) -> None:
    """Checks the last stride; the kernels take any other strides.

    Raises:
        ValueError: the elements of a head are not contiguous.
    """
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the elements of a head must lie side by side")


def _check_caches(*caches: Tensor) -> None:
    """Checks the layout of `KVCache`, for which the kernels are compiled.

    Raises:
        ValueError: a cache has another layout.
    """
    if not all(cache.transpose(1, 2).is_contiguous() for cache in caches):
        raise ValueError("the cache must be contiguous in the order of block, head, slot, element")
