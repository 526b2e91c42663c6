"""The C kernels for this machine, and the same source compiled for smaller instruction sets."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from engine.kernels import build
from engine.kernels.cpu import CpuKernels

# By what the compiler must not use: without VNNI products of 8 bits take several instructions,
# without AVX-512 vectors are narrower.
TARGETS = {
    "whole": (),
    "no vnni": ("-mno-avx512vnni",),
    "no avx-512": ("-mno-avx512f",),
    "avx2 alone": ("-mno-avx512f", "-mno-avxvnni"),
}


def _compiler_exists() -> bool:
    try:
        build.find_compiler()
    except build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _compiler_exists(), reason="no C compiler")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads of torch, and so of the kernels, in the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def kernels_for(target: str) -> CpuKernels:
    """Compiles the kernels; skips the test without a compiler, or without these instructions."""
    try:
        native = CpuKernels(build.build_library())
    except build.BuildError as error:
        pytest.skip(f"no native kernels here: {error}")
    if target == "whole":
        return native
    if native.panel_width != 32:  # two AVX-512 vectors
        pytest.skip("this machine has no wider vectors to leave out")
    return CpuKernels(build.build_library(TARGETS[target]))
