"""The C kernels as fixtures, and what Triton's interpreter needs."""

from __future__ import annotations

from typing import Any

import pytest

from engine.kernels import build
from engine.kernels.cpu import CpuKernels, load
from tests.engine.on_device import INTERPRETED


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


@pytest.fixture
def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs the interpreter, which multiplies bf16 numbers as if their bits were integers."""
    if not INTERPRETED:
        return
    import triton
    from triton.runtime import interpreter

    builder, language = interpreter.InterpreterBuilder, triton.language
    stock = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == language.bfloat16:
            a, b = (self.cast_impl(x, language.float32) for x in (a, b))
        return stock(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)
