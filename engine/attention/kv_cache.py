"""The tensors of the KV cache, their format and size."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_form import BlockForm
from ..protocol.host_memory import available_memory


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per token: `num_kv_heads` keys and values of these head sizes.

    `is_shared` says that keys and values are the same, and stored once.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    is_shared: bool = False

    @property
    def elements_per_token(self) -> int:
        """Numbers stored per token."""
        return self.num_kv_heads * (self.key_dim + (0 if self.is_shared else self.value_dim))


class KVCache:
    """One key and one value tensor per layer, [num_blocks, block_size, num_kv_heads, head_dim].

    They are the same tensor where keys and values are. In memory a block is head-major,
    [num_kv_heads, block_size, head_dim]: the keys of one head are contiguous, with which attention
    measured 12-30 % faster for heads of 64 (benchmarks/cpu_kernels.py).

    With a form whose blocks are of two kinds, all layers are in the same memory. A block has the
    places of its layers one after the other, so that block `b` of the cache is number `b * places`
    in each layer's tensor, which begins at the layer's place::

        block 0                  block 1                  block 2
        | layer 1 | layer 3 | …  | layer 5               | layer 1 | layer 3 | …
          few tokens each          with many tokens

    Args:
        layers: the shapes of layers, by their index; they are the same if blocks are of two kinds.
        num_blocks: blocks.
        block_size: tokens per block, of all layers.
        dtype: of keys and values.
        device: where they are.
        form: of blocks, if layers with a window have their own.
        windowed: those layers.
    """

    def __init__(
        self,
        layers: dict[int, LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        form: BlockForm | None = None,
        windowed: Collection[int] = (),
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size

        def zeros(num_rows: int, shape: LayerShape) -> tuple[Tensor, Tensor]:
            """Memory for keys and values of all heads, [num_rows, head_dim] each."""
            heads = num_rows * shape.num_kv_heads
            key = torch.zeros(heads, shape.key_dim, dtype=dtype, device=device)
            if shape.is_shared:
                return key, key
            return key, torch.zeros(heads, shape.value_dim, dtype=dtype, device=device)

        self.layers: dict[int, tuple[Tensor, Tensor]]
        if form is None or not form.ratio:
            self.layers = {
                index: _blocks(zeros(num_blocks * block_size, shape), shape, block_size)
                for index, shape in layers.items()
            }
            return
        (shape,) = set(layers.values())
        memory = zeros(num_blocks * form.window_places * form.block_size, shape)
        places = {True: itertools.count(), False: itertools.count()}
        self.layers = {}
        for index in sorted(layers):
            is_windowed = index in windowed
            size = form.block_size if is_windowed else form.whole_size
            place = next(places[is_windowed])
            self.layers[index] = _blocks(memory, shape, size, place)


def _blocks(
    memory: tuple[Tensor, Tensor], shape: LayerShape, block_size: int, place: int = 0
) -> tuple[Tensor, Tensor]:
    """A layer's keys and values [num_blocks, block_size, num_kv_heads, head_dim] from a place on.

    Places are as large as a block.
    """
    heads = shape.num_kv_heads

    def view(rows: Tensor) -> Tensor:
        begun = rows[place * block_size * heads :]
        return begun.view(-1, heads, block_size, rows.shape[-1]).transpose(1, 2)

    key, value = memory
    first = view(key)
    return (first, first) if shape.is_shared else (first, view(value))


def largest_value(dtype: torch.dtype) -> float | None:
    """The largest finite value of an 8-bit format, to saturate at; None for wider formats."""
    return float(torch.finfo(dtype).max) if dtype.itemsize == 1 else None


def to_cache_format(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts keys or values to a cache's format; an 8-bit format saturates.

    There is no scale, as in TGI for checkpoints without one.
    """
    bound = largest_value(dtype)
    return (states if bound is None else states.clamp(-bound, bound)).to(dtype)


def bytes_per_token(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes that one token takes in all layers."""
    return sum(shape.elements_per_token for shape in layers.values()) * dtype.itemsize


def bytes_per_block(
    layers: dict[int, LayerShape], block_size: int, dtype: torch.dtype, form: BlockForm | None
) -> int:
    """Bytes that a block takes."""
    if form is None or not form.ratio:
        return bytes_per_token(layers, dtype) * block_size
    (shape,) = set(layers.values())
    return form.window_places * form.block_size * shape.elements_per_token * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
