"""The ranks that compute one model together, and what they exchange.

There is one kind of exchange: every rank gets the tensors of all. Sums are made of that in the
order of the ranks, not by the library's own reduction: that adds parts of a tensor in different
orders, so that a token's result would depend on the tokens with it. All ranks then have the same
numbers bit for bit, and so take the same decisions wherever they depend on logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store

from ..kernels.cpu import CpuKernels
from .exchange import Exchange, SharedMemory

Gather = Callable[[Tensor], Tensor]  # of [...], the same shape on all ranks, to [size, ...]

# One rank may wait for another that loads or compiles; whether all get on is watched elsewhere.
_TIMEOUT = timedelta(hours=1)
# The second is the name that it had before torch 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # all ranks are on one host


@dataclass(frozen=True, slots=True)
class Group:
    """This process's place among the ranks.

    Attributes:
        rank: from 0.
        size: the number of ranks.
        gather: gives every rank the tensors of all, in the order of the ranks.
        exchange: does that on the host, quicker, and in recorded steps too; None without it.
    """

    rank: int
    size: int
    gather: Gather
    exchange: Exchange | None = None

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors, rounded once."""
        if self.exchange is not None and partial.dtype is torch.float32:
            return self.exchange.sum(partial)
        parts = self.gather(partial)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(partial.dtype)

    def concatenate(self, part: Tensor) -> Tensor:
        """All ranks' tensors side by side in the last dimension."""
        if self.exchange is not None:
            return self.exchange.concatenate(part)
        return torch.cat(self.gather(part).unbind(), dim=-1)

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on all ranks; others give one of the same shape."""
        return self.gather(tensor)[0]

    def agrees(self, value: bytes) -> bool:
        """Whether all ranks have the same bytes, of which all have as many."""
        values = self.gather(torch.frombuffer(bytearray(value), dtype=torch.uint8))
        return bool((values == values[0]).all())

    def least(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        return int(self.gather(torch.tensor([value])).min())


def open_store(path: Path, size: int) -> Store:
    """Where the ranks meet: a file in a directory of the user's alone, not a port for everybody."""
    return FileStore(str(path), size)


def join(
    store: Store, rank: int, size: int, *, on_gpu: bool, kernels: CpuKernels | None = None
) -> Group:
    """Waits for the other ranks and becomes one of the group.

    Args:
        store: where the ranks meet.
        rank: of this process; on a GPU it has the device of this number.
        size: the number of ranks.
        on_gpu: whether the model is computed on GPUs, by NCCL; the host's tensors go by gloo.
        kernels: by which ranks that compute on the host exchange results, if all have them.
    """
    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)
    if on_gpu:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)

    def gather(tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(size * tensor.numel())
        _gather_into(gathered, tensor.contiguous().view(-1))
        return gathered.view(size, *tensor.shape)

    sockets = Group(rank, size, gather)
    exchange = None if on_gpu else _exchange(store, sockets, kernels)
    return sockets if exchange is None else Group(rank, size, exchange.gather, exchange)


def _exchange(store: Store, group: Group, kernels: CpuKernels | None) -> Exchange | None:
    """An exchange through memory, if all ranks can."""
    if not group.least(kernels is not None):
        return None
    assert kernels is not None
    memory = SharedMemory(store, group.rank, kernels.exchange_bytes(group.size))
    can_all = group.least(memory.tensor is not None)
    memory.forget_handle()
    if not can_all or memory.tensor is None:
        return None
    return Exchange(kernels, memory.tensor, group.rank, group.size)
