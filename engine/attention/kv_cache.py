"""The tensors of the KV cache, their format and size."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor


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
    """

    def __init__(
        self,
        layers: dict[int, LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size

        def tensor(heads: int, size: int) -> Tensor:
            shape = (num_blocks, heads, block_size, size)
            return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)

        def pair(shape: LayerShape) -> tuple[Tensor, Tensor]:
            key = tensor(shape.num_kv_heads, shape.key_dim)
            if shape.is_shared:
                return key, key
            return key, tensor(shape.num_kv_heads, shape.value_dim)

        self.layers: dict[int, tuple[Tensor, Tensor]] = {
            index: pair(shape) for index, shape in layers.items()
        }


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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
