"""The sampling kernels for a device."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from torch import Tensor

from . import cpu, has_triton


class SamplingKernels(Protocol):
    """What `CpuKernels` and the module `triton_sampling` have in common."""

    def choose(
        self, scores: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `CpuKernels.choose`."""

    def truncate(self, scores: Tensor, limits: Tensor) -> None:
        """See `CpuKernels.truncate`."""


@cache
def sampling_kernels(device: str) -> SamplingKernels | None:
    """The kernels for a type of device; None where torch has to sample."""
    if device == "cpu":
        return cpu.load()
    if not has_triton():
        return None
    from . import triton_sampling

    return triton_sampling
