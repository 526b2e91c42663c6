"""The C kernels for this machine, and the same source compiled for less."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from engine.kernels import build
from engine.kernels.cpu import CpuKernels

# By what the compiler may not use: fp32 in place of VNNI, narrower vectors, the plainest ones.
TARGETS = {"whole": (), "no vnni": ("-mno-avx512vnni",), "no avx-512": ("-mno-avx512f",)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Has torch, and with it the kernels, compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def kernels_for(target: str) -> CpuKernels:
    """Compiles the kernels; skips the test where there is no compiler, or nothing to leave out."""
    try:
        native = CpuKernels(build.build_library())
    except build.BuildError as error:
        pytest.skip(f"no native kernels here: {error}")
    if target == "whole":
        return native
    if native.panel_width != 32:  # two AVX-512 vectors
        pytest.skip("this machine has no wider vectors to leave out")
    return CpuKernels(build.build_library(TARGETS[target]))
