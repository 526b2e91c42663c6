"""A forward pass that applies adapters to the rows of sequences that have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import AdapterRows, ModelInput
from .low_rank import AdaptedRows, Step

Forward = Callable[[ModelInput], Tensor]


class AdaptedForward:
    """Computes steps whose rows have numbers of adapters.

    Args:
        forward: computes any step.
        step: what the layers read.
    """

    def __init__(self, forward: Forward, step: Step) -> None:
        self._forward = forward
        self._step = step

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch."""
        adapters = batch.adapters
        if adapters is None:
            return self._forward(batch)
        self._step.adapted = AdaptedRows(len(batch.input_ids), adapters.rows, adapters.owners)
        try:
            return self._forward(batch)
        finally:
            self._step.adapted = None


class NumberedForward:
    """Puts the numbers of adapters in place of their names.

    Args:
        forward: computes steps whose rows have numbers of adapters.
        names: the adapters, in the order of their numbers.
    """

    def __init__(self, forward: Forward, names: Sequence[str]) -> None:
        self._forward = forward
        self._numbers = {name: number for number, name in enumerate(names)}

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch."""
        if batch.adapters is None:
            return self._forward(batch)
        return self._forward(replace(batch, adapters=self._numbered(batch)))

    def _numbered(self, batch: ModelInput) -> AdapterRows | None:
        adapters = batch.adapters
        assert adapters is not None
        numbers = [self._numbers[name] for name in adapters.names]
        owners = torch.tensor(numbers, device=adapters.owners.device)[adapters.owners]
        is_all = len(owners) == len(batch.input_ids)
        return AdapterRows(None if is_all else adapters.rows, owners)
