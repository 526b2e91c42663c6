"""A forward pass that applies adapters to the rows of sequences that have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..batch.model_input import AdapterRows, ModelInput
from ..transfer import upload
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
        slots = self._bank.slots(adapters.names)
        if self._needs_all_rows:
            return AdapterRows(None, _of_all(slots, adapters, len(batch.input_ids)))
        owners = upload(slots, adapters.owners.device)[adapters.owners]
        is_of_all = len(owners) == len(batch.input_ids)
        return AdapterRows(None if is_of_all else adapters.rows, owners)


def _of_all(slots: list[int], adapters: AdapterRows, num_tokens: int) -> Tensor:
    """The slot of every token of a step; on the host by NumPy, since torch's calls take longer."""
    assert adapters.rows is not None
    device = adapters.owners.device
    if device.type == "cpu":
        of_all = np.full(num_tokens, NO_SLOT)
        of_all[adapters.rows.numpy()] = np.array(slots)[adapters.owners.numpy()]
        return torch.from_numpy(of_all)
    owners = upload(slots, device)[adapters.owners]
    of_rows = torch.full((num_tokens,), NO_SLOT, device=device)
    return of_rows.index_copy_(0, adapters.rows, owners)
