"""Attention on GPUs: chooses sizes and starts the Triton programs, without waiting for the device.

What depends on the batch's contents (lengths, tables, slots) is read by the programs themselves;
the grid depends on shapes alone. So a decode step can be captured in a CUDA graph, where a row of
padding is a sequence with a context of 0 and a negative slot.

All sizes here are unmeasured. They follow from what fits into registers and shared memory, also of
GPUs that have 99 KiB for a program (8.6, 8.9). Where a sequence is cut follows from itself and the
model alone, so that its sums have the same order in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention.kv_cache import largest_value
from . import triton_paged, triton_store

MAX_HEAD_DIM = 256

_LEAST_SPLIT = 128  # keys of a split; more, in contexts that would have too many splits
_FEWEST_SPLITS, _MOST_SPLITS = 32, 128  # bounds of how many a model's sequences may have
_BUSY_SPLITS = 256  # of all key heads together: they keep a GPU busy with one sequence
_PARTS_BYTES = 2**20  # that the splits of a sequence may write, unless they are the fewest
_SPLIT_ROWS = 32  # the most of a sequence that is split: leaves room for guessed tokens
_PROGRAMS_PER_UNIT = 4  # about as many as a multiprocessor has room for
_LEAST_PROGRAMS = 4  # for the splits of a sequence, which may be much longer than the others
_TILE_BYTES = 16_384  # of keys, and of values, that a program has at hand at a time

# Keys are where the block table says, so to load them ahead takes twice the stages: with 3 only the
# table is read while the tile before is computed, with 5 keys and values are, if there is room.
_STAGES, _FEWER_STAGES = 5, 3


class TritonAttention:
    """Triton kernels behind the seam of `engine.attention.paged.AttentionBackend`.

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
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.paged_attention`.

        As many query tokens as sequences count as a decode step, in which row i is sequence i's.
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
            softcap or 0.0,
            sinks,
        )
        shape = (*query.shape[:2], value_cache.shape[3])
        if call.is_decode:
            output = query.new_empty(shape)
            _attend_splits(call, output)
        else:
            output = query.new_zeros(shape)  # tokens of padding may belong to no sequence
            _attend_splits(call, output)
            _attend_tiles(call, output)
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
    def table_and_query_strides(self) -> tuple[int, ...]:
        """In the order in which the programs take them."""
        return self.block_tables.stride(0), *self.query.stride()[:2]

    @property
    def split_tokens(self) -> int:
        """The most query tokens of a sequence that is split."""
        return 1 if self.is_decode else max(min(_SPLIT_ROWS // self.group, self.max_splits), 1)

    @property
    def max_splits(self) -> int:
        """The most splits of a sequence, times its query tokens; a power of 2, and the model's."""
        part_bytes = self.query.shape[1] * self.value_cache.shape[3] * 4
        splits = min(_BUSY_SPLITS // self.kv_heads, _PARTS_BYTES // part_bytes, _MOST_SPLITS)
        return 1 << max(splits, _FEWEST_SPLITS).bit_length() - 1

    @property
    def num_splits(self) -> int:
        """The splits that any sequence of the batch may need."""
        bound = self.block_tables.shape[1] * self.key_cache.shape[1]
        if self.window:  # what the rows of a sequence see, from the edge of a split on
            bound = min(bound, self.window + self.split_tokens + _LEAST_SPLIT)
        return min(-(-bound // _LEAST_SPLIT), self.max_splits)

    def tile(self, element_size: int) -> int:
        """Keys at hand at a time, if elements take so many bytes."""
        row_bytes = max(self.key_lanes, self.value_lanes) * element_size
        return min(max(_TILE_BYTES // row_bytes, 16), 128 // element_size)

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
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "HAS_SINKS": self.sinks is not None,
        }


def _attend_splits(call: _Call, output: Tensor) -> None:
    """Computes the sequences that have few query tokens."""
    split_tokens, num_splits, max_splits = call.split_tokens, call.num_splits, call.max_splits
    rows = _power_of_2(split_tokens * call.group, 16)  # the least that tensor cores take
    element_size = call.query.element_size()
    if element_size == 2:  # fp32 has too few registers for what it converts
        element_size = call.key_cache.element_size()
    is_whole = num_splits == 1
    num_parts = call.group * (num_splits if call.is_decode else max_splits)
    parts = largest = total = None
    if not is_whole:
        shape = (call.num_seqs, call.kv_heads, num_parts)
        parts, largest, total = (
            call.query.new_empty(*shape, *last, dtype=torch.float32)
            for last in ((call.value_cache.shape[3],), (), ())
        )
    # A recorded step allows for the longest context, so nearly all of its splits are empty. Hence
    # there are only as many programs as fit into the GPU; they take one split after the other.
    room = _PROGRAMS_PER_UNIT * _num_units(output.device) // (call.num_seqs * call.kv_heads)
    num_programs = min(num_splits, max(room, _LEAST_PROGRAMS))
    triton_paged.attend_splits[(call.num_seqs, call.kv_heads, num_programs)](
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
        num_parts,
        *call.table_and_query_strides,
        **call.constants,
        ROWS=rows,
        SPLIT_TOKENS=split_tokens,
        TILE=call.tile(element_size),
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=max_splits,
        IS_DECODE=call.is_decode,
        IS_WHOLE=is_whole,
        num_warps=4 if rows == 16 else 8,
        num_stages=_STAGES if rows <= 32 else _FEWER_STAGES,
    )
    if is_whole:
        return
    triton_paged.merge_splits[(call.num_seqs, call.group, call.kv_heads)](
        output,
        parts,
        largest,
        total,
        call.query_start_loc,
        call.context_lens,
        call.sinks,
        num_parts,
        KV_HEADS=call.kv_heads,
        GROUP=call.group,
        VALUE_DIM=call.value_cache.shape[3],
        VALUE_LANES=call.value_lanes,
        SPLIT_TOKENS=split_tokens,
        LEAST_SPLIT=_LEAST_SPLIT,
        MAX_SPLITS=max_splits,
        WINDOW=call.window,
        HAS_SINKS=call.sinks is not None,
        IS_DECODE=call.is_decode,
        num_warps=4 if max_splits == _FEWEST_SPLITS else 8,
    )


def _attend_tiles(call: _Call, output: Tensor) -> None:
    """Computes the sequences that have more query tokens than those that are split."""
    num_tokens, split_tokens = call.query.shape[0], call.split_tokens
    is_wide = max(call.key_lanes, call.value_lanes) > 128
    element_size = call.query.element_size()
    rows = _power_of_2(call.group, 32 if element_size > 2 else 64 if is_wide else 128)
    most_seqs = min(call.num_seqs, num_tokens // (split_tokens + 1))
    if not most_seqs:
        return
    num_tiles = num_tokens // (rows // call.group) + most_seqs  # whose last tiles are not full
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
        *call.table_and_query_strides,
        **call.constants,
        ROWS=rows,
        SPLIT_TOKENS=split_tokens,
        TILE=call.tile(element_size),
        num_warps=8,
        num_stages=_FEWER_STAGES if is_wide else _STAGES,
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


@cache
def _num_units(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter has one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_heads(*tensors: Tensor) -> None:
    """The programs take any strides but this one.

    Raises:
        ValueError: the elements of a head do not lie side by side.
    """
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the elements of a head must lie side by side")


def _check_caches(*caches: Tensor) -> None:
    """The programs are compiled for the layout that `KVCache` has.

    Raises:
        ValueError: a cache has another.
    """
    if not all(cache.transpose(1, 2).is_contiguous() for cache in caches):
        raise ValueError("the cache must be contiguous in the order of block, head, slot, element")
