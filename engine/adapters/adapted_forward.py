"""A forward pass that applies adapters to the rows of sequences that have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..batch import AdapterRows, ModelInput
from .low_rank import AdaptedRows, Step

Forward = Callable[[ModelInput], Tensor]


class AdaptedForward:
    """Computes steps with the adapters of their sequences.

    Args:
        forward: computes any step.
        recorded: computes steps without adapters, some of them from recordings, in which the
            layers of adapters do not occur.
        names: the adapters, in the order of their numbers.
        step: what the layers read.
    """

    def __init__(
        self, forward: Forward, recorded: Forward, names: Sequence[str], step: Step
    ) -> None:
        self._forward = forward
        self._recorded = recorded
        self._numbers = {name: number for number, name in enumerate(names)}
        self._step = step

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch."""
        if batch.adapters is None:
            return self._recorded(batch)
        self._step.adapted = self._rows(batch.adapters, len(batch.input_ids))
        try:
            return self._forward(batch)
        finally:
            self._step.adapted = None

    def _rows(self, adapters: AdapterRows, num_tokens: int) -> AdaptedRows:
        numbers = [self._numbers[name] for name in adapters.names]
        owners = torch.tensor(numbers, device=adapters.owners.device)[adapters.owners]
        rows = None if len(owners) == num_tokens else adapters.rows
        return AdaptedRows(num_tokens, rows, owners)
