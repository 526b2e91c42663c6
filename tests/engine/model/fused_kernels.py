"""The fused kernels for a CPU and for a GPU."""

from __future__ import annotations

import pytest

from engine.model import fusion
from engine.model.fusion import FusedKernels
from tests.engine.native import kernels_for


def native_kernels() -> FusedKernels:
    """The kernels in C."""
    return fusion._native_kernels(kernels_for("whole"))


def triton_kernels() -> FusedKernels:
    """The kernels in Triton; skips the test unless they run in its interpreter."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("these layers are on the CPU")
    kernels = fusion._triton_kernels()
    assert kernels is not None
    return kernels
