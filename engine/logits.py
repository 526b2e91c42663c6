"""What happens to the logits before a token is chosen: one function per parameter, in TGI's order.

Each takes float32 scores [num_rows, vocab_size] and the rows' sequences, and returns scores. It
does nothing, and builds nothing, when no row asks for it. Order and formulas are those of TGI
2.1.1, server/text_generation_server/utils/tokens.py and logits_process.py, except that a row never
depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from .packed_bits import byte_table, spread
from .request import SamplingParams
from .sequence import SampledSequence
from .transfer import upload

_NEVER = float("-inf")
_TOP_P_TOKENS = 256
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, slots=True)
class RowMasks:
    """The tokens that some rows may have.

    `packed` is uint8 [len(rows), at least ceil(vocab_size / 8)] on the scores' device: bit i % 8 of
    byte i // 8 is set if token i is allowed.
    """

    rows: list[int]
    packed: Tensor


def process(
    scores: Tensor, sequences: list[SampledSequence], masks: RowMasks | None = None
) -> Tensor:
    """Applies every step that some row asks for."""
    for penalty in (_repetition_penalty, _frequency_penalty):
        scores = penalty(scores, sequences)
    if masks is not None:
        _mask(scores, masks)
    for step in (_temperature, _top_k, _top_p, _typical_p):
        scores = step(scores, sequences)
    return scores


def _mask(scores: Tensor, masks: RowMasks) -> None:
    """Sets to -inf what a grammar does not allow, in place."""
    bias = spread(masks.packed, _mask_table(scores.device), scores.shape[1])
    if len(masks.rows) == scores.shape[0]:
        scores.add_(bias)
    else:
        scores.index_add_(0, upload(masks.rows, scores.device), bias)


@cache
def _mask_table(device: torch.device) -> Tensor:
    return byte_table(0.0, _NEVER, device)


def _repetition_penalty(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    for row, sequence in enumerate(sequences):
        penalty = sequence.request.sampling.repetition_penalty
        if penalty != 1.0:
            seen = upload(list(sequence.count_tokens()), scores.device)
            old = scores[row, seen]
            scores[row, seen] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def _frequency_penalty(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    for row, sequence in enumerate(sequences):
        penalty = sequence.request.sampling.frequency_penalty
        if penalty != 0.0:
            counts = sequence.count_tokens()
            ids = upload(list(counts), scores.device)
            shares = upload(list(counts.values()), scores.device) / sequence.num_tokens
            scores[row, ids] -= penalty * shares
    return scores


def _temperature(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    values = [sequence.request.sampling.temperature for sequence in sequences]
    if all(value == 1.0 for value in values):
        return scores
    return scores / upload(values, scores.device).unsqueeze(1)


def _top_k(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    def mark(part: Tensor, ks: list[int]) -> Tensor:
        ks = [min(k, part.shape[1]) for k in ks]
        likeliest = torch.topk(part, max(ks)).values
        kth = likeliest.gather(1, upload(ks, part.device).unsqueeze(1) - 1)
        return part < kth  # ties with the k-th stay

    return _drop(scores, sequences, lambda params: params.top_k, mark)


def _top_p(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    def mark(part: Tensor, ps: list[float]) -> Tensor:
        wanted = upload(ps, part.device).unsqueeze(1)
        probs = torch.softmax(part, dim=-1)
        likeliest, order = _likeliest(probs, wanted)
        before = likeliest.cumsum(-1) - likeliest  # the mass of all likelier tokens; first: 0
        return torch.ones_like(part, dtype=torch.bool).scatter(1, order, before >= wanted)

    return _drop(scores, sequences, lambda params: params.top_p, mark)


def _likeliest(probs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's likeliest tokens in order, as many as hold the mass wanted [num_rows, 1].

    On a CPU sorting a whole vocabulary is slow, and a few tokens nearly always hold enough. On a
    GPU it takes less time than to ask whether they do.
    """
    if probs.device.type == "cpu":
        few = torch.topk(probs, min(_TOP_P_TOKENS, probs.shape[1]))
        if bool((few.values.sum(-1, keepdim=True) >= wanted).all()):
            return few.values, few.indices
    everything = torch.sort(probs, descending=True)
    return everything.values, everything.indices


def _typical_p(scores: Tensor, sequences: list[SampledSequence]) -> Tensor:
    def mark(part: Tensor, ps: list[float]) -> Tensor:
        logprobs = torch.log_softmax(part, dim=-1)
        probs = logprobs.exp()
        entropy = -(probs * logprobs).nansum(-1, keepdim=True)
        order = (-logprobs - entropy).abs().argsort(dim=-1)
        mass = probs.gather(1, order).cumsum(-1)
        # Everything behind the first token at which the mass reaches p goes.
        reached = mass >= upload(ps, part.device).unsqueeze(1)
        drop = reached.roll(1, dims=-1)
        drop[:, 0] = False
        return torch.zeros_like(drop).scatter(1, order, drop)

    return _drop(scores, sequences, lambda params: params.typical_p, mark)


def _drop(
    scores: Tensor,
    sequences: list[SampledSequence],
    parameter: Callable[[SamplingParams], _Value | None],
    mark: Callable[[Tensor, list[_Value]], Tensor],
) -> Tensor:
    """Sets to -inf what `mark` says, in those rows only that have the parameter."""
    rows: list[int] = []
    values: list[_Value] = []
    for row, sequence in enumerate(sequences):
        value = parameter(sequence.request.sampling)
        if value is not None:
            rows.append(row)
            values.append(value)
    if not rows:
        return scores
    if len(rows) == len(sequences):
        return scores.masked_fill(mark(scores, values), _NEVER)
    index = upload(rows, scores.device)
    part = scores[index]
    return scores.index_copy(0, index, part.masked_fill(mark(part, values), _NEVER))
