"""Compiles the GPU kernels down to machine code, which needs no GPU.

It is told for which ones, and with which format of the cache::

    python -m tests.engine.compile_for_gpu 80:bfloat16 90:float8_e4m3fn

Finds what Triton's interpreter lets pass: sizes that are no powers of 2, types that do not mix,
instructions that a GPU lacks. Prints each kernel's shared memory in bytes. Must run in a process
of its own, because kernels are decorated for the interpreter or for the compiler.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from engine.kernels import triton_elementwise, triton_paged, triton_sampling, triton_store
from engine.kernels.triton_attention import TritonAttention
from engine.kv_cache import KVCache, LayerShape

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int64: "i64",
}

KERNELS = {
    (module, name): kernel
    for module in (triton_elementwise, triton_paged, triton_sampling, triton_store)
    for name, kernel in vars(module).items()
    if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
}


class _Compiler:
    """Stands where a kernel stands, and compiles it when it would be started."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)

    def __getitem__(self, _grid: tuple[int, ...]) -> _Compiler:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        for index, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name.isupper() or value is None:
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = triton.compiler.ASTSource(self.kernel, signature, constants)
        compiled = triton.compile(source, target=self.target, options=options)
        print(compiled.metadata.name, compiled.metadata.shared)  # noqa: T201 (read by the test)


def compile_all(capability: int, cache_dtype: torch.dtype) -> None:
    """Compiles what a step with prompts needs, which has all kernels, with every option on."""
    for (module, name), kernel in KERNELS.items():
        setattr(module, name, _Compiler(kernel, capability))
    caches = KVCache({0: LayerShape(2, 128, 96)}, 1, 16, cache_dtype, torch.device("cpu")).layers[0]
    states = torch.zeros(6, 8, 128, dtype=torch.bfloat16)
    backend, numbers = TritonAttention(), torch.zeros(3, dtype=torch.int32)
    backend.write_kv(states[:, :2], states[:, :2, :96], *caches, numbers.long())
    angles = torch.zeros(3, 64, dtype=torch.bfloat16)
    rows = states[:3], states[:3, :2], states[:3, :2, :96]
    backend.rotary_write_kv(*rows, angles, angles, *caches, numbers.long())
    backend.paged_attention(
        states,
        *caches,
        torch.zeros(2, 500, dtype=torch.int32),
        numbers,
        numbers[:2],
        1.0,
        sliding_window=1000,
        softcap=30.0,
        sinks=states[0, :, 0],
    )
    for early in (False, True):
        triton_elementwise.rms_norm(
            states, states[0, 0], 1e-6, weight_offset=1.0, rounds_early=early
        )
    for activation in triton_elementwise.ACTIVATIONS:
        triton_elementwise.gated(states, activation=activation)
    triton_sampling.row_statistics(torch.zeros(2, 128_256))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        capability, dtype = argument.split(":")
        compile_all(int(capability), getattr(torch, dtype))
