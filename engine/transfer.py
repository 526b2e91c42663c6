"""Asynchronous copies between the host and the device.

A copy to a GPU from pageable memory, and any read of a result, blocks the host until the GPU has
done all queued work. Here inputs are copied from pinned memory, and results are copied to pinned
memory by a copy that the host waits for later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[float] | NDArray[np.generic],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers as a tensor on the device, for work that is queued afterwards.

    Without `dtype` it has that of the numbers: int64 for Python's ints, float32 for its floats.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class Download:
    """A copy of a result to the host, queued after the work that computes it.

    Args:
        tensor: the result.
    """

    __slots__ = ("_copied", "_host")

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tensor:
        """Waits for the copy and returns it, a tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
