"""Typed access to the C kernels: checks and pointers, no arithmetic of its own.

Everything is fp32, except for the weights of linear layers. The KV cache is logically
[num_blocks, block_size, num_kv_heads, head_size]; any strides will do as long as a head row is
contiguous.
"""

import ctypes
import functools
import math
import mmap
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.linear_bias import LinearBias
from .build import load_library
from .kernel import FLOAT, INT, POINTER, SIZE, Call, Kernel, Program, Types

# Of cos and sin: their addresses, the stride of their rows, and how many elements of a head rotate.
_Rotation = tuple[int | None, int | None, int, int]
_NO_ROTATION: _Rotation = (None, None, 0, 0)
# Of a linear bias: the address of its slopes, and the scale of a rounded one; 0 for an exact one.
_Bias = tuple[int | None, float]
_NO_BIAS: _Bias = (None, 0.0)
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of weights and updates
_PAIRS = 3  # the format of weights whose lanes are pairs of bfloat16
_RANKS = 4  # of an update that are next to each other, as in c/low_rank.h
_ARENA_BYTES = 64 * 2**20  # allocated at once
_ALIGNMENT = 64  # bytes: a cache line, and the longest vector
_MAPPED_BYTES = 32 * 2**20  # glibc maps what is this large anew at each allocation

_KERNELS: dict[str, Types] = {
    "rotate_query": (
        *(POINTER, SIZE, SIZE),
        *(POINTER, POINTER, SIZE, SIZE),
        *(POINTER, SIZE, SIZE, SIZE, INT),
    ),
    "rotate_write_kv": (
        *(POINTER, POINTER, SIZE, SIZE, SIZE, SIZE),
        *(POINTER, POINTER, SIZE, SIZE),
        *(POINTER, POINTER, SIZE, SIZE, SIZE),
        *(POINTER, SIZE, SIZE, SIZE, SIZE, INT),
    ),
    "linear": (*[POINTER] * 4, SIZE, SIZE, SIZE, INT, POINTER, SIZE, INT),
    "adapted_linear": (*[POINTER] * 7, *[SIZE] * 5, INT, INT),
    "int8_linear": (*[POINTER] * 6, SIZE, SIZE, SIZE, POINTER, SIZE, INT),
    "grouped_int8_linear": (*[POINTER] * 5, SIZE, SIZE, SIZE, POINTER, SIZE, INT),
    "int4_linear": (*[POINTER] * 5, SIZE, SIZE, SIZE, SIZE, POINTER, SIZE, INT),
    "add_updates": (POINTER, POINTER, SIZE, *[POINTER] * 3, *[SIZE] * 5, INT),
    "choose": (POINTER, SIZE, SIZE, SIZE, *[POINTER] * 5, INT),
    "truncate": (POINTER, SIZE, SIZE, SIZE, *[POINTER] * 4, INT),
    "sort_by_expert": (POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER),
    "weigh_rows": (POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, INT),
    "take_rows": (POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, SIZE, INT),
    "add": (POINTER, POINTER, POINTER, SIZE, INT),
    "exchange_sum": (POINTER, POINTER, POINTER, SIZE),
    "exchange_gather": (POINTER, POINTER, POINTER, SIZE, SIZE),
    "rms_norm": (POINTER, POINTER, POINTER, SIZE, SIZE, FLOAT, FLOAT, INT),
    "silu_and_mul": (POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, SIZE, INT),
    "gelu_and_mul": (POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, SIZE, INT),
    "activate": (POINTER, POINTER, SIZE, INT, INT),
    "gated_delta_rule": (*[POINTER] * 7, *[SIZE] * 6, INT),
    "causal_conv": (POINTER, SIZE, *[POINTER] * 3, *[SIZE] * 4, INT, INT),
    "paged_attention": (
        *(POINTER, POINTER, SIZE, SIZE),
        *(POINTER, POINTER, SIZE, SIZE, SIZE),
        *(POINTER, SIZE, POINTER, POINTER),
        *(SIZE, SIZE, SIZE, SIZE, SIZE),
        *(FLOAT, SIZE, SIZE, FLOAT, POINTER, POINTER, FLOAT, INT),
    ),
}
_OTHERS: dict[str, tuple[type[Any] | None, Types]] = {
    "tw_has_openmp": (INT, ()),
    "tw_has_float16": (INT, ()),
    "tw_multiplies_pairs": (INT, ()),
    "tw_pin_threads": (None, (POINTER, INT)),
    "tw_max_head_size": (INT, ()),
    "tw_panel_width": (INT, ()),
    "tw_vector_width": (INT, ()),
    "tw_exchange_bytes": (SIZE, (SIZE,)),
    "tw_exchange_open": (POINTER, (POINTER, SIZE, SIZE)),
    "tw_advise_huge": (None, (POINTER, SIZE)),
    "tw_pack_weight": (None, (POINTER, SIZE, SIZE, SIZE, POINTER, INT, INT)),
    "tw_replay": (INT, (POINTER, SIZE)),
}


class Activation(IntEnum):
    """Functions of a number that a kernel computes, as in c/rows.h; GELU is the one with erf."""

    SIGMOID = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    SOFTPLUS = 4


@functools.cache
def load() -> "CpuKernels | None":
    """Return the kernels, compiled at the first call, or None where that is not possible."""
    library = load_library()
    return None if library is None else CpuKernels(library)


class CpuKernels:
    """The functions of one compiled library. Calls release the GIL and follow torch's threads.

    All of them raise ValueError for tensors whose shapes or formats do not go together, and
    MemoryError where there is no memory for their scratch.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the C signatures of a library made by `build.py`."""
        for name, (result, types) in _OTHERS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, types
        self._library = library
        kernels = {name: Kernel(library, name, types) for name, types in _KERNELS.items()}
        self._linear = kernels["linear"]
        self._adapted_linear = kernels["adapted_linear"]
        self._int8_linear = kernels["int8_linear"]
        self._grouped_int8_linear = kernels["grouped_int8_linear"]
        self._int4_linear = kernels["int4_linear"]
        self._add_updates = kernels["add_updates"]
        self._choose = kernels["choose"]
        self._truncate = kernels["truncate"]
        self._attention = kernels["paged_attention"]
        self._rotate_query = kernels["rotate_query"]
        self._rotate_write_kv = kernels["rotate_write_kv"]
        self._sort_by_expert = kernels["sort_by_expert"]
        self._weigh_rows = kernels["weigh_rows"]
        self._take_rows = kernels["take_rows"]
        self._add = kernels["add"]
        self._exchange_sum = kernels["exchange_sum"]
        self._exchange_gather = kernels["exchange_gather"]
        self._rms_norm = kernels["rms_norm"]
        self._silu_and_mul = kernels["silu_and_mul"]
        self._gelu_and_mul = kernels["gelu_and_mul"]
        self._activate = kernels["activate"]
        self._gated_delta_rule = kernels["gated_delta_rule"]
        self._causal_conv = kernels["causal_conv"]
        self._weight_arena = torch.empty(0, dtype=torch.uint8)  # for weights
        self.has_openmp = bool(library.tw_has_openmp())
        self.has_float16 = bool(library.tw_has_float16())
        self.multiplies_pairs = bool(library.tw_multiplies_pairs())
        self.max_head_size: int = library.tw_max_head_size()
        self.panel_width: int = library.tw_panel_width()
        self.vector_width: int = library.tw_vector_width()

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
            _rows(query),
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
            _rows(key),
            _rows(value),
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
            _flat(slot_mapping, torch.int64),
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
            _rows(query),
            query.stride(0),
            query.stride(1),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            block,
            token,
            head,
            _flat(block_tables, torch.int32),
            block_tables.shape[1],
            _flat(query_start_loc, torch.int32),
            _flat(context_lens, torch.int32),
            num_seqs,
            num_heads,
            num_kv_heads,
            head_size,
            key_cache.shape[1],
            scale,
            sliding_window or 0,
            chunk_size or 0,
            softcap or 0.0,
            None if sinks is None else _flat(sinks, torch.float32),
            slopes,
            rounded_scale,
            torch.get_num_threads(),
        )
        return output

    def sort_by_expert(self, index: Tensor, num_experts: int) -> "ExpertRows":
        """Return the rows of tokens, sorted by the experts int64 [num_tokens, top_k] of each.

        Raises:
            IndexError: there is no such expert.
        """
        num_tokens, top_k = index.shape
        rows = ExpertRows(
            index.new_empty(num_experts),
            index.new_empty(num_tokens * top_k),
            index.new_empty(index.shape),
        )
        self._sort_by_expert(
            _flat(index, torch.int64),
            num_tokens,
            top_k,
            num_experts,
            *(part.data_ptr() for part in rows),
        )
        return rows

    def weigh_rows(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Return for each token the sum of rows of x, times their weights: [num_tokens, width].

        A row of the result does not depend on the other tokens, bit for bit.

        Args:
            x: fp32 [num_tokens * top_k, width].
            places: int64 [num_tokens, top_k], as `ExpertRows` has them.
            weights: fp32 of the same shape.
        """
        if places.shape != weights.shape or len(x) != places.numel():
            raise ValueError("expected a row, a place and a weight for each choice of a token")
        (num_tokens, top_k), width = places.shape, x.shape[1]
        output = self._empty_rows(x.new_empty(num_tokens, 0), width)
        self._weigh_rows(
            _flat(x, torch.float32),
            _flat(places, torch.int64),
            _flat(weights, torch.float32),
            output.data_ptr(),
            num_tokens,
            top_k,
            width,
            torch.get_num_threads(),
        )
        return output

    def take_rows(self, x: Tensor, index: Tensor, output: Tensor | None = None) -> Tensor:
        """Return rows of x [N, width], with the indices int64 [n], in output [n, width] if given.

        Raises:
            IndexError: an index is out of range.
        """
        if output is None:
            output = self._empty_rows(x.new_empty(len(index), 0), x.shape[1])
        if x.dtype != torch.float32 or x.stride(1) != 1 or output.shape != (len(index), x.shape[1]):
            raise ValueError("expected fp32 rows, and room for as many as there are indices")
        self._take_rows(
            x.data_ptr(),
            x.stride(0),
            len(x),
            _flat(index, torch.int64),
            _flat(output, torch.float32),
            len(index),
            x.shape[1],
            torch.get_num_threads(),
        )
        return output

    def add(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        """Write a + b into output; all three fp32 of one shape, contiguous."""
        if a.shape != b.shape or a.shape != output.shape:
            raise ValueError("a, b and output differ in shape")
        self._add(
            _flat(a, torch.float32),
            _flat(b, torch.float32),
            _flat(output, torch.float32),
            a.numel(),
            torch.get_num_threads(),
        )

    def exchange_bytes(self, size: int) -> int:
        """Return the bytes of memory, all of them zero, that exchanges among so many ranks take."""
        return int(self._library.tw_exchange_bytes(size))

    def open_exchange(self, memory: Tensor, rank: int, size: int) -> int:
        """Return the address by which a rank makes exchanges in memory that all ranks have.

        Raises:
            MemoryError: there is no room for some numbers of its own.
        """
        if memory.nbytes < self.exchange_bytes(size) or memory.data_ptr() % mmap.PAGESIZE:
            raise ValueError("expected enough memory, from the beginning of a page")
        address: int | None = self._library.tw_exchange_open(memory.data_ptr(), rank, size)
        if address is None:
            raise MemoryError("no room for an exchange")
        return address

    def exchange_sum(self, exchange: int, x: Tensor, output: Tensor) -> None:
        """Write the sum of all ranks' x into output; fp32 of one shape, contiguous."""
        if x.shape != output.shape:
            raise ValueError("x and output differ in shape")
        pointers = _flat(x, torch.float32), _flat(output, torch.float32)
        self._exchange_sum(exchange, *pointers, x.numel())

    def exchange_gather(self, exchange: int, x: Tensor, output: Tensor, size: int) -> None:
        """Write all ranks' rows x [N, width] side by side into output [N, size * width]."""
        rows, width = x.shape
        if output.shape != (rows, size * width):
            raise ValueError("expected room for the rows of all ranks")
        pointers = _flat(x, x.dtype), _flat(output, x.dtype)
        self._exchange_gather(exchange, *pointers, rows, width * x.itemsize)

    def program(self, calls: Iterable[Call]) -> Program:
        """Return a program that makes these calls."""
        return Program(self._library, calls)

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, *, weight_offset: float = 0.0
    ) -> Tensor:
        """Return x / rms(x) * (weight_offset + weight) over the last dimension."""
        width = x.shape[-1]
        if x.dtype != torch.float32 or weight.numel() != width:
            raise ValueError(f"expected fp32 rows of width {weight.numel()}")
        x = x.contiguous()
        output = torch.empty_like(x)
        self._rms_norm(
            x.data_ptr(),
            _flat(weight, torch.float32),
            output.data_ptr(),
            x.numel() // width,
            width,
            epsilon,
            weight_offset,
            torch.get_num_threads(),
        )
        return output

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up; both [T, width], possibly column slices of one tensor."""
        return self._gated(self._silu_and_mul, gate, up)

    def gelu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `silu_and_mul`, with GELU as approximated by tanh."""
        return self._gated(self._gelu_and_mul, gate, up)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """Return an activation of fp32 x, of its shape. A number's does not depend on the others.

        The sigmoid of numbers below -87 is 0.
        """
        x = x.contiguous()
        output = torch.empty_like(x)
        self._activate(
            _flat(x, torch.float32),
            output.data_ptr(),
            x.numel(),
            activation,
            torch.get_num_threads(),
        )
        return output

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Return what a state gives for each token [B, T, H, V], and change it: token by token.

        A token's result does not depend on how a text is divided among calls, bit for bit.

        Args:
            query: fp32 [B, T, G, K], for H / G heads each; K is a multiple of 4.
            key: of the same shape.
            value: fp32 [B, T, H, V].
            decay: fp32 [B, T, H], 0 … 1, by which a token multiplies the state.
            beta: fp32 [B, T, H], how much of what the state lacks a token adds.
            state: fp32 [B, H, K, V].
        """
        (batch, tokens, groups, key_size), (heads, value_size) = key.shape, value.shape[2:]
        fits = query.shape == key.shape and value.shape[:2] == key.shape[:2]
        fits &= decay.shape == beta.shape == value.shape[:3] and heads % groups == 0
        if not fits or key_size % 4 or state.shape != (batch, heads, key_size, value_size):
            raise ValueError("query, key, value, decay, beta and state do not fit together")
        inputs = [x.contiguous() for x in (query, key, value, decay, beta)]
        output = torch.empty_like(inputs[2])
        self._gated_delta_rule(
            *(_flat(x, torch.float32) for x in inputs),
            _flat(state, torch.float32),
            output.data_ptr(),
            batch,
            tokens,
            groups,
            heads,
            key_size,
            value_size,
            torch.get_num_threads(),
        )
        return output

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
    ) -> Tensor:
        """Return sums over windows of x in each channel, or their SiLU: [B, C, T].

        Args:
            x: fp32 [B, C, T + taps - 1].
            weight: fp32 [C, taps].
            bias: fp32 [C].
            silu: whether the SiLU is asked for.
        """
        (channels, taps), (batch, _, width) = weight.shape, x.shape
        if x.shape[1] != channels or width < taps - 1:
            raise ValueError("x and weight do not fit together")
        x, weight = x.contiguous(), weight.contiguous()
        output = x.new_empty(batch, channels, width - taps + 1)
        self._causal_conv(
            _flat(x, torch.float32),
            width,
            _flat(weight, torch.float32),
            None if bias is None else _flat(bias, torch.float32),
            output.data_ptr(),
            batch * channels,
            channels,
            output.shape[2],
            taps,
            silu,
            torch.get_num_threads(),
        )
        return output

    def _gated(self, kernel: Kernel, gate: Tensor, up: Tensor) -> Tensor:
        """Call a kernel for activation(gate) * up."""
        rows, width = gate.shape
        if gate.shape != up.shape or gate.dtype != torch.float32 or up.dtype != torch.float32:
            raise ValueError("gate and up must be fp32 of one shape")
        if gate.stride(1) != 1 or up.stride(1) != 1:
            raise ValueError("rows of gate and up must be contiguous")
        output = self._empty_rows(gate, width)
        kernel(
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            output.data_ptr(),
            rows,
            width,
            torch.get_num_threads(),
        )
        return output

    def pin_threads(self, processors: Sequence[int]) -> None:
        """Bind each of torch's threads, the calling one first, to a processor of its own."""
        numbers = (ctypes.c_int * len(processors))(*processors)
        self._library.tw_pin_threads(numbers, len(processors))

    def advise_huge_pages(self, tensor: Tensor) -> None:
        """Ask the system for huge pages for a large tensor that has not been written yet."""
        self._library.tw_advise_huge(tensor.data_ptr(), tensor.nbytes)

    def _empty_rows(self, like: Tensor, width: int) -> Tensor:
        """Return an uninitialised tensor with a row [width] for each row of another tensor.

        What is mapped anew has no pages yet, and small ones cost more time than the writing.
        """
        output = like.new_empty(*like.shape[:-1], width)
        if output.nbytes >= _MAPPED_BYTES:
            self.advise_huge_pages(output)
        return output

    def empty_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on huge pages, next to the previous one in memory.

        A huge page is as large as a small layer: if each weight had pages of its own, half of the
        weights would be on normal pages, with many TLB misses.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > self._weight_arena.nbytes:
            self._weight_arena = torch.empty(max(num_bytes, _ARENA_BYTES), dtype=torch.uint8)
            self.advise_huge_pages(self._weight_arena)
        weight = self._weight_arena[:num_bytes].view(dtype).view(shape)
        self._weight_arena = self._weight_arena[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return weight

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Return weight [N, K] as panels [N / width rounded up, K, width].

        Args:
            weight: fp32; bfloat16; or, with `has_float16`, float16. The panels have its dtype, in
                an order of the columns of a panel that depends on it.
        """
        out_features, in_features = weight.shape
        panels = -(-out_features // self.panel_width)
        if weight.dtype not in _FORMATS or weight.device.type != "cpu":
            raise ValueError("only fp32, bfloat16 and float16 weights on the CPU can be packed")
        if weight.dtype == torch.float16 and not self.has_float16:
            raise ValueError("this processor does not widen float16")
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        packed = self.empty_weight((panels, in_features, self.panel_width), weight.dtype)
        self._library.tw_pack_weight(
            weight.data_ptr(),
            weight.stride(0),
            out_features,
            in_features,
            packed.data_ptr(),
            _FORMATS[weight.dtype],
            torch.get_num_threads(),
        )
        return packed

    def pack_pairs(self, weight: Tensor) -> Tensor:
        """Return weight [N, K] for `pair_linear`, rounded to bfloat16.

        The panels are int32 [N / width rounded up, K / 2 rounded up, width]: an item has two steps
        of K.
        """
        rounded = weight.detach().to(torch.bfloat16)
        rounded = torch.nn.functional.pad(rounded, (0, rounded.shape[1] % 2)).contiguous()
        return self.pack_weight(rounded.view(torch.float32)).view(torch.int32)

    def pair_linear(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        """Return x [..., K] times a weight that `pack_pairs` made, plus bias: fp32 [..., N].

        Numbers of x are rounded to bfloat16; products are added up in fp32. A row of the result
        does not depend on the other rows of x, bit for bit.
        """
        if packed.dtype != torch.int32 or (x.shape[-1] + 1) // 2 != packed.shape[1]:
            raise ValueError(f"expected input of width {2 * packed.shape[1]}, and pairs")
        return self._multiplied(x, packed, _PAIRS, bias, out_features)

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Return x [..., K] times the packed weight, plus bias: fp32 [..., N].

        A row of the result does not depend on the other rows of x, bit for bit, and is the same
        for a weight of 16 bits as for the same weight in fp32.

        Args:
            x: fp32.
            packed: of a layer, or of the same layer of several experts, one after the other, each
                padded to whole panels, as their biases are.
            bias: fp32.
            out_features: N.
            ends: of experts, int64 [num_experts]: the rows of x before each that the experts
                before have not are this one's. The last is the number of rows.
        """
        if x.shape[-1] != packed.shape[1]:
            raise ValueError(f"expected input of width {packed.shape[1]}")
        return self._multiplied(x, packed, _FORMATS[packed.dtype], bias, out_features, ends)

    def _multiplied(
        self,
        x: Tensor,
        packed: Tensor,
        form: int,
        bias: Tensor | None,
        out_features: int,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Input times a packed weight of a format."""
        if x.dtype != torch.float32:
            raise ValueError("expected fp32 input")
        x = x.contiguous()
        in_features = x.shape[-1]
        output = self._empty_rows(x, out_features)
        self._linear(
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            x.numel() // in_features,
            out_features,
            in_features,
            form,
            *_experts(ends),
            torch.get_num_threads(),
        )
        return output

    def int8_linear(
        self, x: Tensor, weight: "Int8Weight", out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """Return x [..., K] times the weight, plus its bias: fp32 [..., N].

        A row of x is rounded to 8 bits, scaled by its own largest magnitude. A row of the result
        does not depend on the other rows, bit for bit; it is NaN if the row of x is not finite.

        Args:
            x: fp32.
            weight: of a layer, or of the same layer of several experts, one after the other.
            out_features: N.
            ends: of experts, as of `linear`.
        """
        in_features = x.shape[-1]
        if -(-in_features // 4) != weight.packed.shape[1]:
            raise ValueError(f"expected fp32 input of width {4 * weight.packed.shape[1]}")
        return self._rounded(self._int8_linear, x, weight, (out_features, in_features), ends)

    def grouped_int8_linear(
        self, x: Tensor, weight: "GroupedInt8Weight", out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """As `int8_linear`."""
        shape = out_features, 4 * weight.packed.shape[1]
        return self._rounded(self._grouped_int8_linear, x, weight, shape, ends)

    def int4_linear(
        self, x: Tensor, weight: "Int4Weight", out_features: int, ends: Tensor | None = None
    ) -> Tensor:
        """As `int8_linear`."""
        in_features = 8 * weight.packed.shape[1]
        group_size = in_features // weight.groups.shape[1]
        shape = out_features, in_features
        return self._rounded(self._int4_linear, x, weight, shape, ends, group_size)

    def _rounded(
        self,
        kernel: Kernel,
        x: Tensor,
        weight: tuple[Tensor, ...],
        shape: tuple[int, int],
        ends: Tensor | None,
        *group_size: int,
    ) -> Tensor:
        """Call a kernel that rounds rows of x to 8 bits, for a weight of `shape`, N and K."""
        out_features, in_features = shape
        if x.dtype != torch.float32 or x.shape[-1] != in_features:
            raise ValueError(f"expected fp32 input of width {in_features}")
        x = x.contiguous()
        output = self._empty_rows(x, out_features)
        kernel(
            x.data_ptr(),
            *(part.data_ptr() for part in weight),
            output.data_ptr(),
            x.numel() // in_features,
            out_features,
            in_features,
            *group_size,
            *_experts(ends),
            torch.get_num_threads(),
        )
        return output

    def pack_update(self, down: Tensor, up: Tensor) -> "PackedUpdate":
        """Return an update up @ down, fp32 [N, rank] and [rank, K], for `add_updates`.

        It takes half of the memory, and of the time to read it, if 16 bits hold all its numbers.
        May be called from any thread.
        """
        if down.dtype != torch.float32 or up.dtype != torch.float32:
            raise ValueError("expected fp32 matrices")
        dtype = exact_dtype((down, up))
        up_panels = _panels(up.to(dtype), self.panel_width)
        down_groups = self._rank_groups(down.to(dtype))
        if dtype == torch.bfloat16:
            up_panels, down_groups = _paired(up_panels), _paired(down_groups)
        return PackedUpdate(down_groups, up_panels, len(down))

    def _rank_groups(self, down: Tensor) -> Tensor:
        """A matrix [rank, K] as [rank / 4, K / width, 4, width], padded with zeros."""
        missing = -down.shape[1] % self.panel_width, -len(down) % self.vector_width
        padded = torch.nn.functional.pad(down, (0, missing[0], 0, missing[1]))
        blocks = padded.view(-1, _RANKS, padded.shape[1] // self.panel_width, self.panel_width)
        return blocks.transpose(1, 2).contiguous()

    def together(self, updates: Sequence["PackedUpdate"]) -> list["PackedUpdate"]:
        """Copy updates next to each other, on huge pages where they are large enough for these.

        So they are read with fewer TLB misses, and the memory is free when all of them are.
        """
        matrices = [matrix for update in updates for matrix in (update.down, update.up)]
        sizes = [-(-matrix.nbytes // _ALIGNMENT) * _ALIGNMENT for matrix in matrices]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self.advise_huge_pages(memory)
        copies = [
            piece[: matrix.nbytes].view(matrix.dtype).view(matrix.shape).copy_(matrix)
            for piece, matrix in zip(torch.split(memory, sizes), matrices, strict=True)
        ]
        pairs = zip(copies[::2], copies[1::2], updates, strict=True)
        return [PackedUpdate(down, up, update.rank) for down, up, update in pairs]

    def add_updates(self, x: Tensor, y: Tensor, slots: Tensor, updates: "Updates") -> None:
        """Add to each row of y the updates in its slot, times the same row of x; in place.

        A row of the result does not depend on the other rows, bit for bit.

        Args:
            x: fp32 [rows, K].
            y: fp32 [rows, N], with contiguous rows.
            slots: int64 [rows], of the updates; rows with a slot below 0 are not touched.
            updates: read anew in each replay.

        Raises:
            IndexError: there is no such slot.
        """
        rows, in_features = x.shape
        if y.shape[0] != rows or y.stride(1) != 1 or y.dtype != torch.float32:
            raise ValueError(f"expected {rows} fp32 rows to update")
        if slots.numel() != rows:
            raise ValueError("expected a slot for each row")
        self._add_updates(
            _flat(x, torch.float32),
            y.data_ptr(),
            y.stride(0),
            _flat(slots, torch.int64),
            *updates.arguments,
            rows,
            y.shape[1],
            in_features,
            torch.get_num_threads(),
        )

    def adapted_linear(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        slots: Tensor,
        updates: "Updates",
    ) -> Tensor:
        """Return `linear` of x [..., K] with `add_updates` to its rows, bit for bit, by one call.

        Threads are woken once.

        Raises:
            IndexError: there is no such slot.
        """
        if x.dtype != torch.float32 or x.shape[-1] != packed.shape[1]:
            raise ValueError(f"expected fp32 input of width {packed.shape[1]}")
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        if slots.numel() != rows:
            raise ValueError("expected a slot for each row")
        output = self._empty_rows(x, out_features)
        self._adapted_linear(
            x.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            _flat(slots, torch.int64),
            *updates.arguments,
            rows,
            out_features,
            x.shape[-1],
            _FORMATS[packed.dtype],
            torch.get_num_threads(),
        )
        return output

    def choose(
        self, scores: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a token for every row of scores, which are read once from memory.

        A row's result depends on that row alone. NaN and infinities are treated as in torch: the
        maximum of a row with a NaN is NaN, and its token is the first NaN; if the maximum is NaN or
        infinite, the norm is NaN and the draw is ignored.

        Args:
            scores: fp32 [rows, V] with contiguous rows, V at least 1.
            draws: fp64 [rows] in [0, 1): the chosen token is the first at which the cumulative
                probability exceeds the draw. Below 0, and without draws, it is the likeliest token,
                the first of equal ones.

        Returns:
            int64 [rows], the tokens; fp32 [rows], their log-probabilities; fp32 [rows], the maxima;
            fp32 [rows], the norms: the logarithm of the sum of exp(score - maximum).
        """
        rows, width = scores.shape
        self._check_scores(scores)
        if draws is not None and (draws.shape != (rows,) or draws.dtype != torch.float64):
            raise ValueError("expected an fp64 draw for each row")
        draws = None if draws is None else draws.contiguous()  # held until the kernel has read it
        logprobs, maxima, norms = (scores.new_empty(rows) for _ in range(3))
        ids = torch.empty(rows, dtype=torch.int64)
        self._choose(
            scores.data_ptr(),
            scores.stride(0),
            rows,
            width,
            None if draws is None else draws.data_ptr(),
            ids.data_ptr(),
            logprobs.data_ptr(),
            maxima.data_ptr(),
            norms.data_ptr(),
            torch.get_num_threads(),
        )
        return ids, logprobs, maxima, norms

    def truncate(self, scores: Tensor, limits: Tensor) -> None:
        """Divide rows by their temperatures and set the scores of dropped tokens to -inf, in place.

        Rows with a NaN or without a finite maximum are only divided.

        Args:
            scores: fp32 [rows, V] with contiguous rows, V at least 1.
            limits: fp32 [4, rows]: temperature, top-k, top-p and typical-p. Top-k keeps the k
                largest scores and those that equal the last of them; V or more keeps all. Top-p
                keeps the fewest of the largest scores whose probabilities sum to its share, the
                first of equal ones; 1 or more keeps all. Typical-p does the same with the scores
                nearest to the mean score.
        """
        rows, width = scores.shape
        self._check_scores(scores)
        if limits.shape != (4, rows) or limits.dtype != torch.float32:
            raise ValueError("expected four fp32 limits for each row")
        limits = limits.contiguous()
        self._truncate(
            scores.data_ptr(),
            scores.stride(0),
            rows,
            width,
            *(limit.data_ptr() for limit in limits),
            torch.get_num_threads(),
        )

    def _check_scores(self, scores: Tensor) -> None:
        if scores.dtype != torch.float32 or scores.stride(1) != 1 or not scores.shape[1]:
            raise ValueError("expected fp32 scores with contiguous rows")


class Int8Weight(NamedTuple):
    """An int8 weight [N, K] and a bias, laid out for `int8_linear`.

    N is rounded up to whole panels everywhere. `packed` is int8 [panels, K / 4, width, 4]; `scales`
    and `bias` are fp32 [panels * width]; `columns` is int32 [panels * width], the sums over K of
    each output's levels.
    """

    packed: Tensor
    scales: Tensor
    columns: Tensor
    bias: Tensor


class GroupedInt8Weight(NamedTuple):
    """An int8 weight [N, K] in groups of 32 and a bias, laid out for `grouped_int8_linear`.

    N is rounded up to whole panels everywhere. `packed` is int8 [panels, K / 4, width, 4];
    `scales` is [panels, K / 32, width], in float16 with `has_float16` and otherwise in fp32; `bias`
    is fp32 [panels * width].
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor


class Int4Weight(NamedTuple):
    """An int4 weight [N, K] and a bias, laid out for `int4_linear`.

    N is rounded up to whole panels everywhere. `packed` is uint8 [panels, K / 8, width, 4];
    `groups` is int32 [panels, K / group, width], the bits of a bfloat16 scale and, above them, of a
    bfloat16 least value; `bias` is fp32 [panels * width].
    """

    packed: Tensor
    groups: Tensor
    bias: Tensor


class ExpertRows(NamedTuple):
    """Rows of tokens, one for each of their experts, sorted by expert.

    `ends` is int64 [num_experts], the ends of the experts' rows; `tokens` int64 [num_rows], whose
    each row is; `places` int64 [num_tokens, top_k], where a token's rows are.
    """

    ends: Tensor
    tokens: Tensor
    places: Tensor


class PackedUpdate(NamedTuple):
    """A low-rank update of a part of a layer, laid out for `add_updates`.

    `down` is [rank / 4, K / panel width, 4, panel width], its rank rounded up to whole vectors, and
    `up` [N / panel width, rank, panel width], both of one of `_FORMATS`.
    """

    down: Tensor
    up: Tensor
    rank: int


class Updates:
    """The updates of a layer, by its parts and by slots.

    Args:
        parts: of each part the first output and the number of outputs.
        num_slots: of each part.
    """

    def __init__(self, parts: Sequence[tuple[int, int]], num_slots: int) -> None:
        """Begin with empty slots."""
        self._parts = torch.tensor(parts, dtype=torch.int64)
        self._table = torch.zeros(len(parts), num_slots, 4, dtype=torch.int64)
        self._held: dict[tuple[int, int], PackedUpdate] = {}

    def put(self, part: int, slot: int, update: PackedUpdate | None) -> None:
        """Fill a slot of a part, or empty it."""
        if update is None:
            self._table[part, slot] = 0
            self._held.pop((part, slot), None)
            return
        addresses = update.down.data_ptr(), update.up.data_ptr()
        entry = (*addresses, update.rank, _FORMATS[update.down.dtype])
        self._table[part, slot] = torch.tensor(entry)
        self._held[part, slot] = update  # as long as its addresses are in the table

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """Their addresses and sizes, as the kernels take them; they stay the same."""
        num_parts, num_slots, _ = self._table.shape
        return self._table.data_ptr(), self._parts.data_ptr(), num_parts, num_slots


def exact_dtype(
    parts: Sequence[Tensor], formats: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)
) -> torch.dtype:
    """The first of these formats that holds every number of fp32 matrices as it is, or fp32."""
    for dtype in formats:
        if all(torch.equal(part.to(dtype).float(), part) for part in parts):
            return dtype
    return torch.float32


def _panels(matrix: Tensor, width: int) -> Tensor:
    """A matrix [N, K] as [N / width rounded up, K, width], padded with zeros."""
    missing = -len(matrix) % width
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, missing))
    return padded.view(-1, width, matrix.shape[1]).transpose(1, 2).contiguous()


def _experts(ends: Tensor | None) -> tuple[int | None, int]:
    """The address of the ends of experts' rows, and the number of experts."""
    return (None, 1) if ends is None else (_flat(ends, torch.int64), ends.numel())


def _paired(panels: Tensor) -> Tensor:
    """Panels [..., width] of bfloat16 in the order of `pack_weight`: their halves, interleaved."""
    halves = panels.view(*panels.shape[:-1], 2, -1)
    return halves.transpose(-1, -2).reshape(panels.shape)


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


def _rows(tensor: Tensor) -> int:
    """Check that the head rows of a tensor [T, heads, D] are contiguous, and return its address."""
    if tensor.dtype != torch.float32 or tensor.stride(2) != 1:
        raise ValueError("expected fp32 with contiguous head rows")
    return tensor.data_ptr()


def _flat(tensor: Tensor, dtype: torch.dtype) -> int:
    """Check that a tensor is contiguous, and return its address."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor of {dtype}")
    return tensor.data_ptr()


def _bias(linear_bias: LinearBias, num_heads: int) -> _Bias:
    """Check that there is a slope per head, and return what the kernel takes."""
    if linear_bias.slopes.numel() != num_heads:
        raise ValueError("one slope per query head expected")
    return _flat(linear_bias.slopes, torch.float32), linear_bias.rounded_scale or 0.0
