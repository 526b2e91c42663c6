"""A batch of fixed size and address, which recorded steps read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..block_form import BlockForm
from .integers import Integers, integers_of, model_input, shapes_of, zeros
from .model_input import AttentionInput, ModelInput


class TableWidths(NamedTuple):
    """Blocks of the longest sequence, as its tables have them.

    `windowed` is the width of the table for layers with a window; None if they have none of their
    own. `window` is the largest window of these.
    """

    whole: int
    windowed: int | None = None
    window: int = 0

    @classmethod
    def of(cls, num_tokens: int, block_size: int, form: BlockForm | None) -> TableWidths:
        """The widths for a sequence of this many tokens."""
        blocks = -(-num_tokens // block_size)
        if form is None or not form.ratio:
            return cls(blocks)
        return cls(form.num_whole(num_tokens), blocks, form.window)

    def fit(self, attention: AttentionInput) -> bool:
        """Whether a step's tables are no wider."""
        windowed = attention.window
        return attention.block_tables.shape[1] <= self.whole and (
            windowed is None or windowed.block_tables.shape[1] <= (self.windowed or 0)
        )


def blank(
    num_tokens: int, num_seqs: int, num_rows: int, widths: TableWidths, device: torch.device
) -> ModelInput:
    """Zeros, into which batches are copied for recorded steps, which read fixed addresses."""
    return model_input(
        zeros(_shapes(num_tokens, num_seqs, num_rows, widths), device), widths.window
    )


def first_rows(
    rows: ModelInput, num_tokens: int, num_seqs: int, num_rows: int, widths: TableWidths
) -> ModelInput:
    """The first rows of a `blank` batch of the same widths, in the same memory."""
    integers, shapes = integers_of(rows), _shapes(num_tokens, num_seqs, num_rows, widths)
    pairs = zip(integers.present(), shapes.present(), strict=True)
    firsts = integers.replaced(tensor[: shape[0]] for tensor, shape in pairs)
    return model_input(firsts, widths.window)


def _shapes(
    num_tokens: int, num_seqs: int, num_rows: int, widths: TableWidths
) -> Integers[tuple[int, ...]]:
    return shapes_of(num_tokens, num_rows, num_seqs, widths.whole, widths.windowed)


def copy_rows(rows: ModelInput, batch: ModelInput) -> None:
    """Copies a batch's tokens and sequences into the first rows of a batch at least as large."""
    source, target = batch.attention, rows.attention
    num_tokens, num_seqs = len(batch.input_ids), len(source.context_lens)
    rows.input_ids[:num_tokens].copy_(batch.input_ids)
    rows.positions[:num_tokens].copy_(batch.positions)
    target.slot_mapping[:num_tokens].copy_(source.slot_mapping)
    target.context_lens[:num_seqs].copy_(source.context_lens)
    num_blocks = source.block_tables.shape[1]
    target.block_tables[:num_seqs, :num_blocks].copy_(source.block_tables)
    if source.window is not None and target.window is not None:
        _, slots, tables = source.window
        target.window.slot_mapping[:num_tokens].copy_(slots)
        target.window.block_tables[:num_seqs, : tables.shape[1]].copy_(tables)
