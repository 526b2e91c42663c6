"""Compiles the GPU kernels to machine code, which needs no GPU.

Arguments are the compute capability, the dtypes of model and cache, and the head size::

    python -m tests.engine.kernels.compile_for_gpu 80:bfloat16:bfloat16:128

This finds errors that Triton's interpreter does not: sizes that are not powers of 2, mixed types,
instructions that a GPU lacks. Kernels are compiled as Triton itself would for these arguments: it
tells the compiler which of them are multiples of 16, and so how wide loads may be. Prints each
kernel's GPU and shared memory in bytes. Must run in a process of its own, because kernels are
decorated for the interpreter or for the compiler.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.linear_bias import LinearBias
from engine.kernels import (
    triton_elementwise,
    triton_low_rank,
    triton_paged,
    triton_quantize,
    triton_sampling,
    triton_store,
)
from engine.kernels.row_tiles import RowTiles
from engine.kernels.triton_attention import TritonAttention

MODULES = (
    triton_elementwise,
    triton_low_rank,
    triton_paged,
    triton_quantize,
    triton_sampling,
    triton_store,
)
KERNELS = {
    (module, name): kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
}


class _Driver:
    """Replaces Triton's driver of a GPU; compiling needs no more than this."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a different device for each, since Triton caches kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0


class _Compiler:
    """Replaces a kernel, and compiles it when it would be launched."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, _grid: tuple[int, ...]) -> _Compiler:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        metadata = self.kernel.run(*args, grid=None, warmup=True, **named).metadata
        print(metadata.name, self.capability, metadata.shared)  # noqa: T201 (read by the test)


def compile_for(capability: int) -> None:
    """Makes launches of kernels compile them from now on."""
    triton.runtime.driver.set_active(_Driver(capability))
    for (module, name), kernel in KERNELS.items():
        setattr(module, name, _Compiler(kernel, capability))


def attend(dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    """Launches attention's kernels with all options; values have smaller heads than keys."""
    value_dim = head_dim * 3 // 4
    layer = {0: LayerShape(2, head_dim, value_dim)}
    caches = KVCache(layer, 1, 16, cache_dtype, torch.device("cpu")).layers[0]
    backend, numbers = TritonAttention(), torch.zeros(3, dtype=torch.int32)
    num_heads = 8 if head_dim <= 256 else 128  # as many as DeepSeek V3 has, with its wide heads
    states = torch.zeros(20, num_heads, head_dim, dtype=dtype)
    rows = states[:2, :2], states[:2, :2, :value_dim]
    backend.write_kv(*rows, *caches, numbers[:2].long())
    cos = torch.zeros(2, head_dim // 2, dtype=dtype)
    backend.rotary_write_kv(states[:2], *rows, cos, cos, *caches, numbers[:2].long())
    tables = torch.zeros(2, 500, dtype=torch.int32)
    for num_tokens, rounded_scale in ((2, None), (20, 0.125)):  # decoding, and with prompts
        backend.paged_attention(
            states[:num_tokens],
            *caches,
            tables,
            numbers,
            numbers[:2],
            1.0,
            sliding_window=1000,
            chunk_size=900,
            softcap=30.0,
            sinks=states[0, :, 0],
            linear_bias=LinearBias(torch.zeros(num_heads), rounded_scale),
        )


def launch_other_kernels(capability: int) -> None:
    """Launches all kernels that are not attention's."""
    states = torch.zeros(6, 8, 128, dtype=torch.bfloat16)
    for early in (False, True):
        kind = {"weight_offset": 1.0, "rounds_early": early}
        triton_elementwise.rms_norm(states, states[0, 0], 1e-6, **kind)
        triton_elementwise.add_rms_norm(states, states, states[0, 0], 1e-6, **kind)
    for activation in triton_elementwise.ACTIVATIONS:
        triton_elementwise.gated(states, activation=activation)
    scores = torch.zeros(2, 128_256)
    triton_sampling.choose(scores, torch.zeros(2, dtype=torch.float64))
    triton_sampling.choose(scores)
    triton_sampling.truncate(scores, torch.ones(4, 2))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.zeros(3, 14_336, dtype=dtype)
        tiles = RowTiles.of(torch.tensor([0, -1, 1]), 8)
        table, parts = torch.zeros(2, 8, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
        triton_low_rank.add_updates(rows, rows, tiles, table, parts, 7168, 64)
        levels, scales = triton_quantize.quantize_rows(torch.int8, rows, 32)
        if capability >= 89:  # older GPUs have no instructions for fp8_e4m3fn
            triton_quantize.quantize_rows(torch.float8_e4m3fn, rows)
        for bias in (None, rows[0]):
            triton_quantize.scale_sums(levels.int(), scales, rows[:1].float(), bias, dtype)


if __name__ == "__main__":
    capabilities = set()
    for argument in sys.argv[1:]:
        capability, *dtypes, head_dim = argument.split(":")
        compile_for(int(capability))
        attend(*(getattr(torch, dtype) for dtype in dtypes), int(head_dim))
        if capability not in capabilities:
            launch_other_kernels(int(capability))
        capabilities.add(capability)
