"""Penalties, masks and filters on the logits before a token is chosen, in TGI's order.

Each takes float32 scores [num_rows, vocab_size] and the rows' sequences, and returns scores. It
does nothing, and builds nothing, if no row asks for it. Order and formulas are those of TGI 2.1.1,
server/text_generation_server/utils/tokens.py and logits_process.py, except that a row never depends
on the other rows, and that `logit_bias`, `min_p` and `min_new_tokens` are not in TGI.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..scheduling.sequence import SampledSequence
from ..scheduling.token_counts import TokenCounts
from ..transfer import upload
from .packed_bits import byte_table, spread
from .truncation import truncate

_NEVER = float("-inf")
_EVERYTHING = float("inf")  # for a top-k
_LEAST_SHARE = 1e-30  # smaller top-p and typical-p may be 0 in float32, and keep no token at all


@dataclass(frozen=True, slots=True)
class RowMasks:
    """The tokens that the grammars of some rows allow.

    `packed` is uint8 [len(rows), at least ceil(vocab_size / 8)] on the scores' device: bit i % 8 of
    byte i // 8 is set if token i is allowed.
    """

    rows: list[int]
    packed: Tensor


def process(
    scores: Tensor, sequences: list[SampledSequence], masks: RowMasks | None = None
) -> Tensor:
    """Applies every penalty, mask and filter that some row asks for."""
    for step in (_logit_bias, _repetition_penalty, _frequency_penalty):
        scores = step(scores, sequences)
    if masks is not None:
        _mask(scores, masks)
    for step in (_withhold_ends, _min_p, _truncate):
        scores = step(scores, sequences)
    return scores


def _mask(scores: Tensor, masks: RowMasks) -> None:
    """Sets the scores of tokens that a grammar does not allow to -inf, in place."""
    bias = spread(masks.packed, _mask_table(scores.device), scores.shape[1])
    if len(masks.rows) == scores.shape[0]:
        scores.add_(bias)
    else:
        scores.index_add_(0, upload(masks.rows, scores.device), bias)


@cache
def _mask_table(device: torch.device) -> Tensor:
    return byte_table(0.0, _NEVER, device)


def _logit_bias(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    """Adds what callers want added. It comes before the penalties, as in vLLM."""
    biases = [sequence.request.sampling.logit_bias for sequence in sequences]
    if any(biases):
        rows = np.repeat(np.arange(len(biases)), [len(pairs) for pairs in biases])
        ids, values = np.array([pair for pairs in biases for pair in pairs]).T
        row, column = upload(np.stack([rows, ids.astype(np.int64)]), scores.device)
        scores[row, column] += upload(values.astype(np.float32), scores.device)
    return scores


def _repetition_penalty(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    penalties = [sequence.request.sampling.repetition_penalty for sequence in sequences]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 1.0]
    if rows:
        counts = [sequences[row].count_tokens() for row in rows]
        seen = _indices(rows, counts, scores.device)
        strengths = _repeated([penalties[row] for row in rows], counts)
        penalty = upload(strengths, scores.device)
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def _frequency_penalty(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    penalties = [sequence.request.sampling.frequency_penalty for sequence in sequences]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 0.0]
    if rows:
        counts = [sequences[row].count_tokens() for row in rows]
        lengths = _repeated([sequences[row].num_tokens for row in rows], counts)
        shares = np.frombuffer(b"".join(count.counts for count in counts), np.float32) / lengths
        strengths = _repeated([penalties[row] for row in rows], counts)
        scores[_indices(rows, counts, scores.device)] -= upload(strengths * shares, scores.device)
    return scores


def _indices(
    rows: list[int], counts: list[TokenCounts], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column of the scores of all tokens that occur in the rows' texts, each once."""
    repeated_rows = np.repeat(np.array(rows), [len(count.ids) for count in counts])
    ids = np.frombuffer(b"".join(count.ids for count in counts), dtype=np.int64)
    row, column = upload(np.stack([repeated_rows, ids]), device)
    return row, column


def _repeated(values: list[float] | list[int], counts: list[TokenCounts]) -> NDArray[np.float32]:
    """The number of each row, repeated for each of the row's tokens."""
    return np.repeat(np.array(values, dtype=np.float32), [len(count.ids) for count in counts])


def _withhold_ends(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    """Allows no token that ends the text, where a row has too few tokens for that."""
    pairs = [
        (row, token_id)
        for row, sequence in enumerate(sequences)
        if sequence.num_generated_tokens < sequence.request.min_new_tokens
        for token_id in sequence.request.eos_token_ids | sequence.request.stop_token_ids
    ]
    if pairs:
        rows, ids = upload(np.array(pairs).T, scores.device)
        scores[rows, ids] = _NEVER
    return scores


def _min_p(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    """Drops tokens that are less likely than the likeliest one by more than the factor `min_p`.

    Probabilities are those after the temperature t: p < min_p * p_max is, in logits, the same as
    x < x_max + t * log(min_p). It comes before the other filters, as in vLLM.
    """
    params = [sequence.request.sampling for sequence in sequences]
    if any(p.min_p for p in params):
        distances = [p.temperature * math.log(p.min_p) if p.min_p else _NEVER for p in params]
        edges = scores.amax(1) + upload(distances, scores.device, torch.float32)
        scores.masked_fill_(scores < edges.unsqueeze(1), _NEVER)
    return scores


def _truncate(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    params = [sequence.request.sampling for sequence in sequences]
    limits = [
        [p.temperature for p in params],
        [_EVERYTHING if p.top_k is None else float(p.top_k) for p in params],
        [1.0 if p.top_p is None else p.top_p for p in params],
        [1.0 if p.typical_p is None else p.typical_p for p in params],
    ]
    if limits == [[value] * len(params) for value in (1.0, _EVERYTHING, 1.0, 1.0)]:
        return scores
    rows = np.array(limits, dtype=np.float32)
    rows[2:] = rows[2:].clip(min=_LEAST_SHARE)
    return truncate(scores, upload(rows, scores.device))
