"""Each filter is compared with a naive one for a single row, and rows with rows in a batch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.protocol.request import Request, SamplingParams
from engine.sampling.logits import RowMasks, process
from engine.scheduling.sequence import DraftedSequence, Sequence

VOCAB_SIZE = 12
NEVER = float("-inf")


def make_sequence(token_ids: tuple[int, ...] = (1, 2), **sampling: Any) -> Sequence:
    """A sequence with these sampling parameters."""
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=token_ids,
            max_new_tokens=9,
            sampling=SamplingParams(**sampling),
        )
    )


def apply(scores: list[float], token_ids: tuple[int, ...] = (1, 2), **sampling: Any) -> list[float]:
    """The processed scores of one row."""
    result: list[float] = process(torch.tensor([scores]), [make_sequence(token_ids, **sampling)])[
        0
    ].tolist()
    return result


def kept(scores: list[float]) -> set[int]:
    """The ids that can still be chosen."""
    return {index for index, score in enumerate(scores) if score != NEVER}


def softmax(scores: list[float]) -> list[float]:
    """Probabilities, in double precision."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def naive(scores: list[float], token_ids: tuple[int, ...], params: SamplingParams) -> list[float]:
    """All filters for one row, in plain Python. It does not handle ties at an edge."""
    scores = list(scores)
    for token_id in set(token_ids):
        penalty = params.repetition_penalty
        scores[token_id] *= penalty if scores[token_id] < 0 else 1 / penalty
    for token_id, count in Counter(token_ids).items():
        scores[token_id] -= params.frequency_penalty * count / len(token_ids)
    scores = [score / params.temperature for score in scores]
    probs = softmax(scores)
    keep = {i for i in range(len(scores)) if probs[i] >= params.min_p * max(probs)}
    if params.top_k is not None:
        keep &= set(sorted(keep, key=lambda i: -scores[i])[: params.top_k])
    if params.top_p is not None:
        probs = softmax([scores[i] if i in keep else NEVER for i in range(len(scores))])
        mass = 0.0
        chosen: set[int] = set()
        for index in sorted(keep, key=lambda i: -scores[i]):
            if mass < params.top_p or not chosen:
                chosen.add(index)
            mass += probs[index]
        keep = chosen
    if params.typical_p is not None:
        probs = softmax([scores[i] if i in keep else NEVER for i in range(len(scores))])
        entropy = -sum(probs[i] * math.log(probs[i]) for i in keep)
        mass = 0.0
        chosen = set()
        for index in sorted(keep, key=lambda i: abs(-math.log(probs[i]) - entropy)):
            if mass < params.typical_p or not chosen:
                chosen.add(index)
            mass += probs[index]
        keep = chosen
    return [score if index in keep else NEVER for index, score in enumerate(scores)]


# Shares have many digits, so that no sum of probabilities equals one.
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
    top_k=st.sampled_from([None, 1, 3, 7, 100]),
    top_p=st.sampled_from([None, 0.0137, 0.3713, 0.6431, 0.9177]),
    typical_p=st.sampled_from([None, 0.0137, 0.3713, 0.6431, 0.9177]),
    min_p=st.sampled_from([0.0, 0.0713, 0.4137, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.7]),
)
# Scores differ by more than rounding, so that their order is certain.
scores_strategy = st.permutations(range(VOCAB_SIZE)).flatmap(
    lambda order: st.floats(0.05, 1.0).map(lambda unit: [(i - 5) * unit + 0.013 for i in order])
)
tokens_strategy = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8).map(tuple)
single_params = st.sampled_from(
    [
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.6431),
        SamplingParams(typical_p=0.6431),
        SamplingParams(min_p=0.0713),
        SamplingParams(min_p=0.4137, temperature=1.7),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(frequency_penalty=0.7),
    ]
)


def assert_close(actual: list[float], expected: list[float]) -> None:
    """Same ids kept, scores equal up to float32."""
    assert kept(actual) == kept(expected)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=200)
@given(scores_strategy, tokens_strategy, single_params)
def test_each_filter_alone_matches_the_naive_one(
    scores: list[float], token_ids: tuple[int, ...], params: SamplingParams
) -> None:
    sequence = make_sequence(token_ids)
    sequence.request = replace(sequence.request, sampling=params)
    actual = process(torch.tensor([scores]), [sequence])[0].tolist()
    assert_close(actual, naive(scores, token_ids, params))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(scores_strategy, tokens_strategy, params_strategy), min_size=1, max_size=6)
)
def test_a_row_does_not_depend_on_the_other_rows(
    rows: list[tuple[list[float], tuple[int, ...], SamplingParams]],
) -> None:
    sequences = []
    for _, token_ids, params in rows:
        sequence = make_sequence(token_ids)
        sequence.request = replace(sequence.request, sampling=params)
        sequences.append(sequence)
    together = process(torch.tensor([scores for scores, _, _ in rows]), sequences)
    for row, (scores, _, _) in enumerate(rows):
        alone = process(torch.tensor([scores]), [sequences[row]])
        assert together[row].tolist() == alone[0].tolist()
        assert kept(together[row].tolist()), "something can always be chosen"


def test_all_filters_together_run_in_order() -> None:
    scores = [0.0, 3.0, 2.5, 2.0, -1.0, 1.0, 0.3, -2.0, 0.7, 1.4, -0.2, -3.0]
    params = SamplingParams(
        temperature=0.7,
        top_k=6,
        top_p=0.91,
        typical_p=0.83,
        min_p=0.05,
        repetition_penalty=1.2,
        frequency_penalty=0.4,
    )
    sequence = make_sequence((1, 4, 4, 9))
    sequence.request = replace(sequence.request, sampling=params)
    actual = process(torch.tensor([scores]), [sequence])[0].tolist()
    assert_close(actual, naive(scores, (1, 4, 4, 9), params))
    assert 1 < len(kept(actual)) < 6


def test_nothing_is_built_when_no_row_asks() -> None:
    scores = torch.randn(3, VOCAB_SIZE)
    before = scores.clone()
    assert process(scores, [make_sequence() for _ in range(3)]) is scores
    assert torch.equal(scores, before)


def test_repetition_penalty_lowers_scores_of_both_signs_once() -> None:
    scores = apply([2.0, -2.0, 5.0, 0.0], (0, 0, 1, 3), repetition_penalty=2.0)
    assert scores == [1.0, -4.0, 5.0, 0.0]


def test_frequency_penalty_takes_the_share_of_each_token() -> None:
    scores = apply([1.0, 1.0, 1.0], (0, 0, 0, 1), frequency_penalty=0.4)
    assert scores == pytest.approx([1 - 0.4 * 0.75, 1 - 0.4 * 0.25, 1.0])


def test_penalties_count_generated_tokens_too() -> None:
    sequence = make_sequence((0,), repetition_penalty=2.0)
    sequence.append(1)
    assert process(torch.tensor([[2.0, 2.0, 2.0]]), [sequence]).tolist() == [[1.0, 1.0, 2.0]]


def test_top_k_keeps_all_that_tie_with_the_last() -> None:
    assert kept(apply([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], top_k=2)) == {1, 2, 3, 4}


def test_top_k_larger_than_the_vocabulary_keeps_everything() -> None:
    assert kept(apply([1.0, 3.0, 2.0], top_k=1000)) == {0, 1, 2}


@pytest.mark.parametrize("share", [1e-300, 1e-12, 1e-6, 0.01])
def test_top_p_and_typical_p_keep_at_least_one(share: float) -> None:
    scores = [0.0] * VOCAB_SIZE
    assert len(kept(apply(scores, top_p=share))) == 1
    assert len(kept(apply(scores, typical_p=share))) == 1


def test_top_p_keeps_the_fewest_that_reach_the_share() -> None:
    scores = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert kept(apply(scores, top_p=0.49)) == {1}
    assert kept(apply(scores, top_p=0.51)) == {1, 3}
    assert kept(apply(scores, top_p=0.76)) == {1, 2, 3}
    assert kept(apply(scores, top_p=0.999)) == {0, 1, 2, 3}


def test_typical_p_prefers_tokens_of_average_surprise() -> None:
    # Entropy 1.19: of the surprises 0.69, 1.39, 2.08 the middle one is nearest.
    scores = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    assert kept(apply(scores, typical_p=0.2)) == {1}
    assert kept(apply(scores, typical_p=0.3)) == {0, 1}


def test_typical_p_ignores_tokens_that_are_dropped_already() -> None:
    scores = [math.log(0.5), math.log(0.25), NEVER, math.log(0.25)]
    assert 2 not in kept(apply(scores, typical_p=0.999))


def test_min_p_of_one_keeps_the_likeliest_and_its_equals() -> None:
    assert kept(apply([0.0, 2.0, 1.9999, 2.0], min_p=1.0)) == {1, 3}


def test_min_p_counts_from_the_likeliest_token_that_a_mask_leaves() -> None:
    scores = torch.tensor([[9.0, 1.0, 0.9, -9.0]])
    packed = torch.tensor([[0b1110]], dtype=torch.uint8)
    left = process(scores, [make_sequence(min_p=0.5)], RowMasks([0], packed))[0].tolist()
    assert kept(left) == {1, 2}


@pytest.mark.parametrize(
    ("num_generated", "allowed"), [(0, {0, 3}), (1, {0, 3}), (2, {0, 1, 2, 3})]
)
def test_tokens_that_end_a_text_wait_for_the_fewest_tokens(
    num_generated: int, allowed: set[int]
) -> None:
    sequence = make_sequence()
    sequence.request = replace(
        sequence.request,
        min_new_tokens=2,
        eos_token_ids=frozenset({1}),
        stop_token_ids=frozenset({1, 2}),
    )
    for _ in range(num_generated):
        sequence.append(0)
    scores = torch.zeros(2, 4)
    rows = process(scores, [make_sequence(), sequence]).tolist()
    assert kept(rows[0]) == {0, 1, 2, 3}
    assert kept(rows[1]) == allowed


def test_draft_tokens_count_as_generated() -> None:
    sequence = make_sequence()
    sequence.request = replace(sequence.request, min_new_tokens=1, eos_token_ids=frozenset({1}))
    sequence.draft_ids = [5, 5]
    rows = [DraftedSequence(sequence, count) for count in range(3)]
    ends = process(torch.zeros(3, 4), rows)[:, 1].tolist()
    assert ends == [NEVER, 0.0, 0.0]


def test_nan_of_one_row_stays_in_it() -> None:
    def batch(first: Tensor) -> tuple[Tensor, list[Sequence]]:
        mate = torch.arange(VOCAB_SIZE, dtype=torch.float32)
        sequences = [
            make_sequence(top_k=3, top_p=0.9, typical_p=0.9, temperature=0.5),
            make_sequence(top_k=2, top_p=0.9, typical_p=0.9, min_p=0.01, temperature=0.5),
        ]
        return torch.stack([first, mate]), sequences

    bad = process(*batch(torch.full((VOCAB_SIZE,), float("nan"))))
    good = process(*batch(torch.zeros(VOCAB_SIZE)))
    assert torch.log_softmax(bad[0], -1).isnan().all()
    assert torch.equal(bad[1], good[1])


class TestLogitBias:
    def test_only_the_named_tokens_of_the_row_change(self) -> None:
        scores = torch.zeros(3, 5)
        rows = [
            make_sequence(logit_bias=((1, 2.5), (4, -1.0))),
            make_sequence(),
            make_sequence(logit_bias=((0, 100.0),)),
        ]
        result = process(scores, rows)
        assert result.tolist() == [[0, 2.5, 0, 0, -1], [0] * 5, [100, 0, 0, 0, 0]]

    def test_it_comes_before_penalties(self) -> None:
        row = make_sequence((1,), logit_bias=((1, 3.0),), repetition_penalty=2.0)
        assert process(torch.ones(1, 3), [row])[0, 1] == (1 + 3) / 2

    def test_no_bias_lifts_a_token_that_a_grammar_forbids(self) -> None:
        masks = RowMasks([0], torch.tensor([[0b001]], dtype=torch.uint8))
        result = process(torch.zeros(1, 3), [make_sequence(logit_bias=((2, 100.0),))], masks)
        assert result.tolist() == [[0.0, NEVER, NEVER]]
