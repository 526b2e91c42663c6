"""Typed access to the C kernels: checks and pointers, no arithmetic of its own.

Each `cpu_*.py` has the kernels of one kind with their C signatures; `CpuKernels` are all of them.
Everything is fp32, except for the weights of linear layers.
"""

from __future__ import annotations

import functools
from enum import IntEnum

from .build import load_library
from .cpu_attention import AttentionKernels
from .cpu_elementwise import ElementwiseKernels
from .cpu_exchange import ExchangeKernels
from .cpu_experts import ExpertKernels
from .cpu_linear import LinearKernels
from .cpu_low_rank import LowRankKernels
from .cpu_quantized import QuantizedKernels
from .cpu_recurrence import RecurrenceKernels
from .cpu_sampling import SamplingKernels


class Activation(IntEnum):
    """Functions of a number that a kernel computes, as in c/rows.h; GELU is the one with erf."""

    SIGMOID = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    SOFTPLUS = 4


@functools.cache
def load() -> CpuKernels | None:
    """Return the kernels, compiled at the first call, or None where that is not possible."""
    library = load_library()
    return None if library is None else CpuKernels(library)


def required() -> CpuKernels:
    """Return the kernels, for layers that cannot do without them.

    Raises:
        RuntimeError: there are none on this machine.
    """
    kernels = load()
    if kernels is None:
        raise RuntimeError("native CPU kernels are not available")
    return kernels


class CpuKernels(
    AttentionKernels,
    LinearKernels,
    QuantizedKernels,
    LowRankKernels,
    ExpertKernels,
    ElementwiseKernels,
    RecurrenceKernels,
    SamplingKernels,
    ExchangeKernels,
):
    """The functions of one compiled library. Calls release the GIL and follow torch's threads.

    All of them raise ValueError for tensors whose shapes or formats do not go together, and
    MemoryError where there is no memory for their scratch.
    """
