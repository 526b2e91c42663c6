"""The C kernels as fixtures."""

from __future__ import annotations

import pytest

from engine.kernels import build
from engine.kernels.cpu import CpuKernels, load


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    loaded = load()
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def narrow_kernels(kernels: CpuKernels) -> CpuKernels:
    """The same source for a smaller instruction set: other vector widths and tiles."""
    if kernels.panel_width != 32:  # two AVX-512 vectors
        pytest.skip("this machine has no wider vectors to leave out")
    return CpuKernels(build.build_library(["-mno-avx512f"]))
