"""A fake model whose only memory of a text are states in slots, and engines over it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch.model_input import ModelInput, SequenceState, StateRows
from engine.engine import Engine
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.state_blocks import StateBlockManager
from engine.scheduling.state_slots import StateSlots
from tests.engine.fakes import BLOCK_SIZE, CPU, next_logits

State = tuple[int, ...]  # the tokens of a text so far
_WRONG: State = (0,) * 50  # of no text


def _spelled_out(rows: StateRows) -> tuple[list[int], list[SequenceState]]:
    """Where each sequence's tokens start, and its state, in decode steps as well."""
    if rows.decoding is None:
        return rows.starts, rows.sequences
    sequences = [SequenceState(slot, begins=False) for slot in rows.decoding.tolist()]
    return [*range(len(sequences) + 1)], sequences


class FakeStates:
    """Its states are the tokens of texts: that of another text, or length, gives other tokens."""

    def __init__(self, num_slots: int, logits_of: Callable[[State], Tensor]) -> None:
        self.slots = [_WRONG] * num_slots
        self._logits_of = logits_of

    @torch.inference_mode()
    def __call__(self, batch: ModelInput) -> Tensor:
        """The logits of the wanted rows."""
        assert batch.states is not None
        starts, sequences = _spelled_out(batch.states)
        restored = [
            (state.slot, self.slots[state.source])
            for state in sequences
            if state.source is not None
        ]
        for slot, content in restored:
            self.slots[slot] = content
        rows: list[Tensor] = []
        for state, (start, end) in zip(sequences, itertools.pairwise(starts), strict=True):
            rows += self._compute(state, batch.input_ids[start:end].tolist())
        return torch.stack(rows)[batch.logits_rows]

    def _compute(self, state: SequenceState, token_ids: list[int]) -> list[Tensor]:
        content = () if state.begins else self.slots[state.slot]
        after = [content := (*content, token_id) for token_id in token_ids]
        for slot, kept in zip(state.drafts, after, strict=False):
            self.slots[slot] = kept
        for num_tokens, slot in state.copies:
            self.slots[slot] = after[num_tokens - 1]
        self.slots[state.slot] = content
        return [self._logits_of(kept) for kept in after]


def make_state_engine(
    *,
    num_blocks: int = 64,
    num_seqs: int = 4,
    num_copies: int = 8,
    interval: int = 0,
    runs_ahead: bool = False,
    logits_of: Callable[[State], Tensor] = next_logits,
    **limits: int,
) -> Engine:
    """An engine over a `FakeStates`; `limits` are those of `Scheduler`."""
    slots = StateSlots(num_seqs + num_copies, num_copies)
    blocks = StateBlockManager(num_blocks, BLOCK_SIZE, slots, interval=interval)
    scheduler = Scheduler(blocks, **{"max_step_tokens": 64, "max_num_seqs": num_seqs, **limits})
    return Engine(FakeStates(slots.num_slots, logits_of), scheduler, CPU, runs_ahead=runs_ahead)
