"""A forward pass that applies adapters to the rows of sequences that have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import AdapterRows, ModelInput
from .bank import AdapterBank
from .low_rank import NO_SLOT, AdaptedRows, Step

Forward = Callable[[ModelInput], Tensor]


class AdaptedForward:
    """Computes steps whose rows have slots of adapters.

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


class SlottedForward:
    """Brings the adapters of a step to the device, and puts their slots in place of their names.

    Args:
        forward: computes steps whose rows have slots of adapters.
        bank: knows the slots.
        needs_all_rows: whether `forward` wants a slot for every token.
    """

    def __init__(self, forward: Forward, bank: AdapterBank, *, needs_all_rows: bool) -> None:
        self._forward = forward
        self._bank = bank
        self._needs_all_rows = needs_all_rows

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """Logits [num_rows, vocab_size] of any batch."""
        if batch.adapters is None:
            return self._forward(batch)
        return self._forward(replace(batch, adapters=self._slotted(batch)))

    def _slotted(self, batch: ModelInput) -> AdapterRows:
        adapters = batch.adapters
        assert adapters is not None
        assert adapters.rows is not None
        slots = torch.tensor(self._bank.slots(adapters.names), device=adapters.owners.device)
        owners = slots[adapters.owners]
        if len(owners) == len(batch.input_ids):
            return AdapterRows(None, owners)
        if not self._needs_all_rows:
            return AdapterRows(adapters.rows, owners)
        of_all = owners.new_full((len(batch.input_ids),), NO_SLOT)
        of_all[adapters.rows] = owners
        return AdapterRows(None, of_all)
