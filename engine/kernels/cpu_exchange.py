"""Exchanges of ranks through memory that all of them map, by C kernels."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from .addresses import flat
from .cpu_library import CpuLibrary
from .kernel import POINTER, SIZE


class ExchangeKernels(CpuLibrary):
    """Sums and gathers of what all ranks have."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._exchange_bytes = self._function("exchange_bytes", SIZE, SIZE)
        self._exchange_open = self._function("exchange_open", POINTER, POINTER, SIZE, SIZE)
        self._exchange_sum = self._kernel("exchange_sum", POINTER, POINTER, POINTER, SIZE)
        self._exchange_gather = self._kernel(
            "exchange_gather", POINTER, POINTER, POINTER, SIZE, SIZE
        )

    def exchange_bytes(self, size: int) -> int:
        """Return the bytes of memory, all of them zero, that exchanges among so many ranks take."""
        return int(self._exchange_bytes(size))

    def open_exchange(self, memory: Tensor, rank: int, size: int) -> int:
        """Return the address by which a rank makes exchanges in memory that all ranks have.

        Raises:
            MemoryError: there is no room for some numbers of its own.
        """
        if memory.nbytes < self.exchange_bytes(size) or memory.data_ptr() % mmap.PAGESIZE:
            raise ValueError("expected enough memory, from the beginning of a page")
        address: int | None = self._exchange_open(memory.data_ptr(), rank, size)
        if address is None:
            raise MemoryError("no room for an exchange")
        return address

    def exchange_sum(self, exchange: int, x: Tensor, output: Tensor) -> None:
        """Write the sum of all ranks' x into output; fp32 of one shape, contiguous."""
        if x.shape != output.shape:
            raise ValueError("x and output differ in shape")
        pointers = flat(x, torch.float32), flat(output, torch.float32)
        self._exchange_sum(exchange, *pointers, x.numel())

    def exchange_gather(self, exchange: int, x: Tensor, output: Tensor, size: int) -> None:
        """Write all ranks' rows x [N, width] side by side into output [N, size * width]."""
        rows, width = x.shape
        if output.shape != (rows, size * width):
            raise ValueError("expected room for the rows of all ranks")
        pointers = flat(x, x.dtype), flat(output, x.dtype)
        self._exchange_gather(exchange, *pointers, rows, width * x.itemsize)
