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
from typing import NamedTuple

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
    scores: Tensor,
    sequences: list[SampledSequence],
    masks: RowMasks | None = None,
    sampled_ids: Tensor | None = None,
) -> Tensor:
    """Applies every penalty, mask and filter that some row asks for.

    `sampled_ids` int64 [rows of the previous step], on the scores' device: tokens that the host has
    not read yet, which are the last ones of sequences with a `pending_row`.
    """
    scores = _logit_bias(scores, sequences)
    for penalise in (_repetition_penalty, _frequency_penalty):
        penalise(scores, sequences, sampled_ids)
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


def _repetition_penalty(
    scores: Tensor, sequences: list[SampledSequence], sampled_ids: Tensor | None
) -> None:
    """Makes tokens that occur in a row's text less likely, in place; how often does not matter."""
    penalties = [sequence.request.sampling.repetition_penalty for sequence in sequences]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 1.0]
    if not rows:
        return
    counts = [sequences[row].count_tokens() for row in rows]
    seen = [_indices(rows, counts, scores.device)]
    strengths = [_repeated([penalties[row] for row in rows], counts)]
    last = _last_tokens(rows, sequences, sampled_ids)
    if last is not None:
        seen.append((last.row, last.ids))
        strengths.append(np.array([penalties[row] for row in last.rows], dtype=np.float32))
    # All are computed of the old scores: a last token that occurred before gets its score twice.
    old = [scores[where] for where in seen]
    for where, before, values in zip(seen, old, strengths, strict=True):
        penalty = upload(values, scores.device)
        scores[where] = torch.where(before < 0, before * penalty, before / penalty)


def _frequency_penalty(
    scores: Tensor, sequences: list[SampledSequence], sampled_ids: Tensor | None
) -> None:
    """Makes tokens less likely by their share of a row's text, in place."""
    penalties = [sequence.request.sampling.frequency_penalty for sequence in sequences]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 0.0]
    if not rows:
        return
    counts = [sequences[row].count_tokens() for row in rows]
    lengths = _repeated([sequences[row].num_tokens for row in rows], counts)
    occurrences = np.frombuffer(b"".join(count.counts for count in counts), np.float32)
    strengths = _repeated([penalties[row] for row in rows], counts)
    seen = _indices(rows, counts, scores.device)
    last = _last_tokens(rows, sequences, sampled_ids)
    if last is None:
        scores[seen] -= upload(strengths * (occurrences / lengths), scores.device)
        return
    numbers = upload(np.stack([occurrences, lengths, strengths]), scores.device)
    of_last = [
        [float(sequences[row].num_tokens) for row in last.rows],
        [penalties[row] for row in last.rows],
    ]
    numbers_of_last = upload(np.array(of_last, dtype=np.float32), scores.device)
    _penalise_with_last(scores, seen, numbers, last, numbers_of_last)


class _LastTokens(NamedTuple):
    """The last tokens of some rows, which only the device knows: `row` and `ids` int64 [n]."""

    rows: list[int]
    row: Tensor
    ids: Tensor


def _last_tokens(
    rows: list[int], sequences: list[SampledSequence], sampled_ids: Tensor | None
) -> _LastTokens | None:
    """The last tokens of those rows whose last token the host does not know; None if it knows all.

    Their counts lack that token.
    """
    pending = {row: sequences[row].pending_row for row in rows}
    late = {row: source for row, source in pending.items() if source is not None}
    if not late:
        return None
    assert sampled_ids is not None
    row, source = upload(np.array([[*late], [*late.values()]]), sampled_ids.device)
    return _LastTokens([*late], row, sampled_ids[source])


def _penalise_with_last(
    scores: Tensor,
    seen: tuple[Tensor, Tensor],
    numbers: Tensor,
    last: _LastTokens,
    numbers_of_last: Tensor,
) -> None:
    """The frequency penalty where the device has to count the last tokens itself.

    Args:
        scores: changed in place.
        seen: row and id of n known tokens.
        numbers: float32 [3, n]: how often they occur, the lengths of their texts, the strengths.
        last: the tokens to count beside them.
        numbers_of_last: float32 [2, len(last.rows)]: the lengths of their texts, the strengths.
    """
    occurrences, lengths, strengths = numbers
    last_of_row = seen[0].new_full((len(scores),), -1)
    last_of_row[last.row] = last.ids
    is_last = (seen[1] == last_of_row[seen[0]]).float()
    known = scores.new_zeros(len(scores)).index_add_(0, seen[0], occurrences * is_last)
    where = (last.row, last.ids)
    old = scores[where]
    scores[seen] -= strengths * ((occurrences + is_last) / lengths)
    lengths, strengths = numbers_of_last
    scores[where] = old - strengths * ((known[last.row] + 1.0) / lengths)


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
