"""A step's work as tensors.

All tokens of a step stand in one row, sequence after sequence, whatever phase each is in::

    sequence      A (decode)  B (prefill, 3 of 5 tokens)   C (decode)
    input_ids     [ a9      |  b0  b1  b2                |  c4 ]        num_tokens = 5
    positions     [ 9       |  0   1   2                 |  4  ]
    query_start_loc 0          1                            4    5
    context_lens    10         3                            5            tokens in the cache after
    it logits_rows   [ 0                                       4  ]         B has no next token yet
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .scheduler import ScheduledBatch
from .sequence import Sequence
from .transfer import upload


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What attention needs to know beside query, key and value.

    `slot_mapping` int64 [num_tokens]: where a token's key and value go, block * block_size +
    offset. `block_tables` int32 [num_seqs, max_blocks], padded with 0. `query_start_loc` int32
    [num_seqs + 1]. `context_lens` int32 [num_seqs].
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The rows of logits that give a prompt's log-probabilities.

    Row `start + i` of the logits belongs to the prompt token `target_ids[i]` that follows it.
    """

    sequence: Sequence
    start: int
    target_ids: list[int]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The input of one forward pass.

    `input_ids` and `positions` int64 [num_tokens]; `logits_rows` int64 [num_rows]: the tokens whose
    logits are wanted. `sampled` says which rows of the logits give a sequence its next tokens: one,
    and one more behind each guessed token.
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionInput
    logits_rows: Tensor
    sampled: dict[Sequence, range]
    prompt_rows: list[PromptRows]


def pack(
    batch: ScheduledBatch,
    block_size: int,
    device: torch.device,
    promised_ids: Tensor | None = None,
) -> ModelInput:
    """Lays the tokens of a scheduled batch out as tensors on `device`.

    `promised_ids` int64 [rows of the last step], on the device: the tokens that sequences were
    promised and the host does not know yet.
    """
    counts = np.fromiter(batch.num_tokens.values(), dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    computed = np.array([s.num_computed_tokens for s in batch.num_tokens], dtype=np.int64)
    tables = _block_tables(list(batch.num_tokens))
    owners = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - computed, counts)
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size
    rows, sampled, prompt_rows = _logits_rows(batch, starts)
    input_ids = upload(_input_ids(batch), device)
    if promised_ids is not None:
        promised = promised_ids[(-1 - input_ids).clamp(min=0)]  # see `Sequence.promise`
        input_ids = torch.where(input_ids < 0, promised, input_ids)
    return ModelInput(
        input_ids=input_ids,
        positions=upload(positions, device),
        attention=AttentionInput(
            slot_mapping=upload(slots + positions % block_size, device, torch.int64),
            block_tables=upload(tables, device, torch.int32),
            query_start_loc=upload(starts, device, torch.int32),
            context_lens=upload(computed + counts, device, torch.int32),
        ),
        logits_rows=upload(rows, device, torch.int64),
        sampled=sampled,
        prompt_rows=prompt_rows,
    )


def blank(
    num_tokens: int, num_seqs: int, num_rows: int, max_blocks: int, device: torch.device
) -> ModelInput:
    """Zeros to copy one batch after another into, for who computes at fixed addresses."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return ModelInput(
        input_ids=zeros(num_tokens, dtype=torch.int64),
        positions=zeros(num_tokens, dtype=torch.int64),
        attention=AttentionInput(
            slot_mapping=zeros(num_tokens, dtype=torch.int64),
            block_tables=zeros(num_seqs, max_blocks, dtype=torch.int32),
            query_start_loc=zeros(num_seqs + 1, dtype=torch.int32),
            context_lens=zeros(num_seqs, dtype=torch.int32),
        ),
        logits_rows=zeros(num_rows, dtype=torch.int64),
        sampled={},
        prompt_rows=[],
    )


def copy_rows(rows: ModelInput, batch: ModelInput) -> None:
    """Copies a batch's tokens and sequences into the first of at least as many rows."""
    source, target = batch.attention, rows.attention
    num_tokens, num_seqs = len(batch.input_ids), len(source.context_lens)
    rows.input_ids[:num_tokens].copy_(batch.input_ids)
    rows.positions[:num_tokens].copy_(batch.positions)
    target.slot_mapping[:num_tokens].copy_(source.slot_mapping)
    target.context_lens[:num_seqs].copy_(source.context_lens)
    num_blocks = source.block_tables.shape[1]
    target.block_tables[:num_seqs, :num_blocks].copy_(source.block_tables)


def _input_ids(batch: ScheduledBatch) -> np.ndarray:
    ids: list[int] = []
    for sequence, num_tokens in batch.num_tokens.items():
        start = sequence.num_computed_tokens
        ids += sequence.token_ids[start : start + num_tokens]
        ids += sequence.draft_ids
    return np.array(ids, dtype=np.int64)


def _block_tables(sequences: list[Sequence]) -> np.ndarray:
    tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), dtype=np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return tables


def _logits_rows(
    batch: ScheduledBatch, starts: np.ndarray
) -> tuple[np.ndarray, dict[Sequence, range], list[PromptRows]]:
    rows: list[int] = []
    sampled: dict[Sequence, range] = {}
    prompt_rows: list[PromptRows] = []
    for (sequence, num_tokens), start in zip(batch.num_tokens.items(), starts, strict=False):
        first = sequence.num_computed_tokens
        end = first + num_tokens
        if sequence.request.prompt_logprobs and first < sequence.num_prompt_tokens:
            targets = sequence.token_ids[first + 1 : min(end + 1, sequence.num_prompt_tokens)]
            prompt_rows.append(PromptRows(sequence, len(rows), targets))
            rows += range(int(start), int(start) + len(targets))
        num_drafts = len(sequence.draft_ids)
        if end == sequence.num_tokens + num_drafts:
            sampled[sequence] = range(len(rows), len(rows) + 1 + num_drafts)
            last = int(start) + num_tokens - 1
            rows += range(last - num_drafts, last + 1)
    return np.array(rows, dtype=np.int64), sampled, prompt_rows
