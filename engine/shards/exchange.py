"""What ranks on one host exchange through memory that all of them map, by the C kernels.

A sum of a decode step's rows takes a few microseconds; through gloo's sockets it takes a hundred,
and a model has two for each layer. And it is a call of a kernel, which recorded steps have too.
"""

from __future__ import annotations

import logging
import mmap
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from ..kernels.cpu import CpuKernels

logger = logging.getLogger(__name__)

_KEY = "exchange"  # in the store: where the memory is


class Exchange:
    """A rank's end.

    Args:
        kernels: the same on all ranks.
        memory: uint8, which all ranks map, zeros at first.
        rank: of this process.
        size: the number of ranks.
    """

    def __init__(self, kernels: CpuKernels, memory: Tensor, rank: int, size: int) -> None:
        self._kernels = kernels
        self._memory = memory  # stays mapped
        self._size = size
        self._address = kernels.open_exchange(memory, rank, size)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' float32 tensors, in their order."""
        partial = partial.contiguous()
        total = torch.empty_like(partial)
        self._kernels.exchange_sum(self._address, partial, total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors [...] of any format, as [size, ...]."""
        return self._side_by_side(tensor.reshape(1, -1)).view(self._size, *tensor.shape)

    def concatenate(self, part: Tensor) -> Tensor:
        """All ranks' tensors side by side in the last dimension."""
        rows = part.reshape(-1, part.shape[-1])
        return self._side_by_side(rows).view(*part.shape[:-1], self._size * part.shape[-1])

    def _side_by_side(self, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        output = rows.new_empty(len(rows), self._size * rows.shape[1])
        self._kernels.exchange_gather(self._address, rows, output, self._size)
        return output


class SharedMemory:
    """Memory without a name, which the first rank makes and the others find in the store.

    Args:
        store: where the ranks meet.
        rank: of this process.
        num_bytes: its size.

    Attributes:
        tensor: uint8; None if this rank cannot map it, with the reason logged.
    """

    def __init__(self, store: Store, rank: int, num_bytes: int) -> None:
        self.tensor: Tensor | None = None
        self._handle: int | None = None
        try:
            if rank == 0:
                self._handle = os.memfd_create("tokenwire exchange")
                os.ftruncate(self._handle, num_bytes)
                store.set(_KEY, f"/proc/{os.getpid()}/fd/{self._handle}")
            else:
                self._handle = os.open(Path(store.get(_KEY).decode()), os.O_RDWR)
            self.tensor = torch.frombuffer(mmap.mmap(self._handle, num_bytes), dtype=torch.uint8)
        except OSError as error:
            logger.warning("ranks exchange results through sockets: %s", error)
            if rank == 0 and self._handle is None:
                store.set(_KEY, "/proc/nothing")

    def forget_handle(self) -> None:
        """Closes the file, once all ranks have mapped it; the memory stays."""
        if self._handle is not None:
            with suppress(OSError):
                os.close(self._handle)
            self._handle = None
