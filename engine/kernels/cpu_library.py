"""What all C kernels have in common: the compiled library, its threads and memory for results."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernel import INT, POINTER, SIZE, Call, Kernel, Program

_ARENA_BYTES = 64 * 2**20  # allocated at once
ALIGNMENT = 64  # bytes: a cache line, and the longest vector
_MAPPED_BYTES = 32 * 2**20  # glibc maps what is this large anew at each allocation


class CpuLibrary:
    """A library made by `build.py`; each class of kernels declares its own C signatures.

    Args:
        library: the library.

    Attributes:
        has_openmp: whether kernels use torch's threads.
        has_float16: whether the processor widens float16.
        multiplies_pairs: whether it multiplies pairs of bfloat16.
        max_head_size: of attention.
        panel_width: outputs of a linear layer that are packed side by side.
        vector_width: numbers of a vector.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._pin_threads = self._function("pin_threads", None, POINTER, INT)
        self._advise_huge = self._function("advise_huge", None, POINTER, SIZE)
        self._function("replay", INT, POINTER, SIZE)  # of programs
        self._weight_arena = torch.empty(0, dtype=torch.uint8)  # for weights
        self.has_openmp = bool(self._function("has_openmp", INT)())
        self.has_float16 = bool(self._function("has_float16", INT)())
        self.multiplies_pairs = bool(self._function("multiplies_pairs", INT)())
        self.max_head_size: int = self._function("max_head_size", INT)()
        self.panel_width: int = self._function("panel_width", INT)()
        self.vector_width: int = self._function("vector_width", INT)()

    def _function(self, name: str, result: type[Any] | None, *types: type[Any]) -> Any:
        """A function of the library that is no kernel, without its prefix `tw_`."""
        function = getattr(self._library, f"tw_{name}")
        function.restype, function.argtypes = result, types
        return function

    def _kernel(self, name: str, *types: type[Any]) -> Kernel:
        """A kernel, whose arguments have these types."""
        return Kernel(self._library, name, types)

    def program(self, calls: Iterable[Call]) -> Program:
        """Return a program that makes these calls."""
        return Program(self._library, calls)

    def pin_threads(self, processors: Sequence[int]) -> None:
        """Bind each of torch's threads, the calling one first, to a processor of its own."""
        numbers = (ctypes.c_int * len(processors))(*processors)
        self._pin_threads(numbers, len(processors))

    def advise_huge_pages(self, tensor: Tensor) -> None:
        """Ask the system for huge pages for a large tensor that has not been written yet."""
        self._advise_huge(tensor.data_ptr(), tensor.nbytes)

    def _empty_rows(self, like: Tensor, width: int) -> Tensor:
        """Return an uninitialised tensor with a row [width] for each row of another tensor.

        What is mapped anew has no pages yet, and small ones cost more time than the writing.
        """
        output = like.new_empty(*like.shape[:-1], width)
        if output.nbytes >= _MAPPED_BYTES:
            self.advise_huge_pages(output)
        return output

    def empty_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on huge pages, next to the previous one in memory.

        A huge page is as large as a small layer: if each weight had pages of its own, half of the
        weights would be on normal pages, with many TLB misses.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > self._weight_arena.nbytes:
            self._weight_arena = torch.empty(max(num_bytes, _ARENA_BYTES), dtype=torch.uint8)
            self.advise_huge_pages(self._weight_arena)
        weight = self._weight_arena[:num_bytes].view(dtype).view(shape)
        self._weight_arena = self._weight_arena[-(-num_bytes // ALIGNMENT) * ALIGNMENT :]
        return weight
