"""A rank's forward pass for a plan, which is on the host and may lack the newest tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch.integers import uploaded
from ..batch.model_input import ModelInput
from .group import Group


class SharedForward:
    """Computes the steps that the first rank plans, before it knows the tokens of the last one.

    Those are on the first rank's device. They go to the other ranks' devices in the same queue as
    the work, so that no host waits for them.

    Args:
        forward: computes a step on the device.
        group: the ranks.
        device: where the batches go.
    """

    def __init__(
        self, forward: Callable[[ModelInput], Tensor], group: Group, device: torch.device
    ) -> None:
        self._forward = forward
        self._group = group
        self._device = device

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of a batch on the host.

        `batch.previous` has the tokens on the first rank; on others it has their number.
        """
        on_device = uploaded(batch, self._device)
        if batch.previous is not None:
            on_device = on_device.filled(self._group.first(batch.previous.to(self._device)))
        return self._forward(on_device)
