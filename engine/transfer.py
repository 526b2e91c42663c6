"""Copies between the host and the device that neither of them waits for.

A copy to a GPU out of ordinary memory, and any read of a result, stops the host until the GPU has
done all it was told. Here numbers go out through pinned memory, and results come back in a copy
that is waited for once, later.
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
    """Numbers as a tensor on the device; work queued afterwards finds them there.

    Without `dtype` it is that of the numbers: int64 for Python's ints, float32 for its floats.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class Download:
    """A result on its way to the host, behind all work that is queued now.

    Args:
        tensor: the result.
    """

    __slots__ = ("_arrived", "_host")

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> Tensor:
        """The result, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
