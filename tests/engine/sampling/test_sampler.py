"""Sampling tokens: greedy and random, log-probabilities, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.protocol.request import Request, SamplingParams
from engine.sampling.sampler import prompt_logprobs, prompt_tops, sample
from engine.scheduling.sequence import Sequence

VOCAB_SIZE = 50


def make_sequence(num_tokens: int = 2, **sampling: Any) -> Sequence:
    """A sequence of this length with these sampling parameters."""
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=(1,) * num_tokens,
            max_new_tokens=9,
            sampling=SamplingParams(**sampling),
        )
    )


def noise(num_rows: int, seed: int = 0, size: int = VOCAB_SIZE) -> Tensor:
    """Random logits."""
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_likeliest_and_its_logprob() -> None:
    logits = noise(4)
    tokens = sample(logits.clone(), [make_sequence() for _ in range(4)]).wait()
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).max(-1).values.tolist()
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-6)
    assert all(token.top == () for token in tokens)


def test_drawn_tokens_follow_the_softmax() -> None:
    size, draws = 20, 40_000
    logits = noise(1, size=size) / 2
    counts = torch.zeros(size)
    for first in range(0, draws, 2000):
        sequences = [make_sequence(do_sample=True, seed=first + i) for i in range(2000)]
        tokens = sample(logits.expand(2000, -1).clone(), sequences).wait()
        counts += torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=size)
    expected = logits[0].softmax(-1) * draws
    assert float(expected.min()) > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Chi-square with 19 degrees of freedom exceeds 67 with probability 3e-7; seeds are fixed.
    assert statistic < 67


def test_successive_positions_of_one_seed_follow_the_softmax_too() -> None:
    size, draws = 8, 8000
    logits = noise(1, seed=3, size=size) / 3
    sequences = [make_sequence(1 + i % 1000, do_sample=True, seed=i // 1000) for i in range(draws)]
    tokens = sample(logits.expand(draws, -1).clone(), sequences).wait()
    counts = torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=size)
    expected = logits[0].softmax(-1) * draws
    # Chi-square with 7 degrees of freedom exceeds 42 with probability 5e-7; seeds are fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 42


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 32), st.integers(1, 40))
def test_same_seed_gives_the_same_token_alone_and_in_a_batch(
    seed: int, row: int, num_tokens: int
) -> None:
    options: dict[str, Any] = {"do_sample": True, "seed": seed, "temperature": 0.8, "top_p": 0.9}
    logits = noise(33, seed=row)
    others = [
        make_sequence(3 + i, do_sample=i % 2 == 0, seed=i, top_k=1 + i, top_n_tokens=i % 3)
        for i in range(33)
    ]
    others[row] = make_sequence(num_tokens, **options)
    together = sample(logits.clone(), others).wait()[row]
    alone = sample(logits[row : row + 1].clone(), [make_sequence(num_tokens, **options)]).wait()[0]
    assert together == alone


def test_seeds_and_positions_change_the_draw() -> None:
    logits = torch.zeros(64, VOCAB_SIZE)
    by_seed = sample(
        logits.clone(), [make_sequence(do_sample=True, seed=i) for i in range(64)]
    ).wait()
    by_position = sample(
        logits.clone(), [make_sequence(i + 1, do_sample=True) for i in range(64)]
    ).wait()
    assert len({token.token_id for token in by_seed}) > 20
    assert len({token.token_id for token in by_position}) > 20


def test_a_row_with_nan_gets_a_nan_logprob_and_changes_no_other() -> None:
    logits = noise(4)
    options: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "seed": 3},
        {"top_n_tokens": 2},
        {"do_sample": True},
    ]
    sequences = [make_sequence(**option) for option in options]
    expected = sample(logits.clone(), sequences).wait()
    for bad in range(4):
        spoiled = logits.clone()
        spoiled[bad, 7] = float("nan")
        tokens = sample(spoiled, sequences).wait()
        assert math.isnan(tokens[bad].logprob)
        assert tokens[bad].top == ()
        assert 0 <= tokens[bad].token_id < VOCAB_SIZE
        assert [t for i, t in enumerate(tokens) if i != bad] == [
            t for i, t in enumerate(expected) if i != bad
        ]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_row_of_infinities_counts_as_nan(value: float) -> None:
    tokens = sample(torch.full((1, VOCAB_SIZE), value), [make_sequence(do_sample=True)]).wait()
    assert math.isnan(tokens[0].logprob)


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5), st.integers(0, 2**32))
def test_a_token_without_probability_is_never_drawn(allowed: set[int], seed: int) -> None:
    logits = torch.full((64, VOCAB_SIZE), float("-inf"))
    logits[:, list(allowed)] = noise(1, size=len(allowed))[0]
    tokens = sample(
        logits, [make_sequence(do_sample=True, seed=seed + i) for i in range(64)]
    ).wait()
    assert {token.token_id for token in tokens} <= allowed
    assert all(math.isfinite(token.logprob) for token in tokens)


def test_top_tokens_come_in_order_with_their_logprobs() -> None:
    logits = noise(2)
    tokens = sample(logits.clone(), [make_sequence(top_n_tokens=3), make_sequence()]).wait()
    values, ids = logits[0].log_softmax(-1).topk(3)
    assert tokens[0].top == tuple(zip(ids.tolist(), values.tolist(), strict=True))
    assert tokens[1].top == ()


def test_only_rows_that_ask_for_likeliest_tokens_are_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[int] = []
    topk = torch.topk

    def counted(scores: Tensor, k: int) -> Any:
        searched.append(len(scores))
        return topk(scores, k)

    monkeypatch.setattr(torch, "topk", counted)
    logits = noise(5)
    wanted = [0, 3, 0, 0, 1]
    tokens = sample(logits.clone(), [make_sequence(top_n_tokens=n) for n in wanted]).wait()
    assert searched == [2]
    assert [len(token.top) for token in tokens] == wanted
    for row in (1, 4):
        ids = [token_id for token_id, _ in tokens[row].top]
        assert ids == topk(logits[row], wanted[row]).indices.tolist()
        assert tokens[row].top[0] == (tokens[row].token_id, pytest.approx(tokens[row].logprob))


def test_top_tokens_include_all_that_tie_with_the_last() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0, 0.0]])
    top = sample(logits, [make_sequence(top_n_tokens=2)]).wait()[0].top
    assert [token_id for token_id, _ in top] == [1, 2, 3, 4]


def test_top_tokens_leave_out_filtered_tokens() -> None:
    top = sample(noise(1), [make_sequence(top_n_tokens=5, top_k=2)]).wait()[0].top
    assert len(top) == 2


def test_more_top_tokens_than_the_vocabulary_has_gives_all() -> None:
    assert len(sample(noise(1), [make_sequence(top_n_tokens=99)]).wait()[0].top) == VOCAB_SIZE


def test_logprobs_are_those_after_all_filters() -> None:
    token = sample(noise(1), [make_sequence(do_sample=True, top_k=1)]).wait()[0]
    assert token.logprob == 0.0


def test_prompt_logprobs_are_those_of_the_targets() -> None:
    logits = noise(3)
    expected = [float(logits.log_softmax(-1)[row, target]) for row, target in enumerate((4, 0, 9))]
    assert prompt_logprobs(logits, [4, 0, 9]).wait().tolist() == expected


def test_no_targets_give_no_prompt_logprobs() -> None:
    assert prompt_logprobs(noise(3)[:0], []).wait().tolist() == []


def test_prompt_tops_are_the_likeliest_with_the_same_logprobs() -> None:
    logits = torch.randn(4, 11)
    ids, logprobs = prompt_tops(logits, 3).wait().unbind(1)
    for row, found, values in zip(logits.log_softmax(-1), ids.long(), logprobs, strict=True):
        assert found.tolist() == row.argsort(descending=True)[:3].tolist()
        assert values.tolist() == row[found].tolist()
    targets = ids[:, 1].long().tolist()
    assert prompt_logprobs(logits, targets).wait().tolist() == logprobs[:, 1].tolist()


def test_more_prompt_tops_than_the_vocabulary_has_gives_all() -> None:
    assert prompt_tops(torch.randn(2, 4), 9).wait().shape == (2, 2, 4)
