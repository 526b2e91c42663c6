"""Choosing a token in each row: the likeliest, as in torch, or one that is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.choice import Choice, in_torch
from tests.engine.native import TARGETS, kernels_for, threads
from tests.engine.on_device import DEVICE

NAN, INF = math.nan, math.inf
WAYS = [*TARGETS, "triton", "torch"]
widths = st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 4097, 9000, 20_003]))


def expected(scores: Tensor) -> Choice:
    top, ids = scores.amax(dim=-1), scores.argmax(dim=-1)
    norm = torch.logsumexp((scores - top.unsqueeze(1)).double(), dim=-1).float()
    return Choice(ids, 0.0 - norm, top, norm)


def choose(way: str, scores: Tensor, draws: Tensor | None = None) -> Choice:
    if way == "torch":
        return in_torch(scores, draws)
    if way == "triton":
        module = pytest.importorskip("engine.kernels.triton_sampling")
        with np.errstate(all="ignore"):  # the interpreter warns; a GPU does not
            draws = None if draws is None else draws.to(DEVICE)
            return Choice(*(part.cpu() for part in module.choose(scores.to(DEVICE), draws)))
    return Choice(*kernels_for(way).choose(scores, draws))


def check(way: str, scores: Tensor) -> None:
    for got, wanted in zip(choose(way, scores), expected(scores), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=3e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    width=widths,
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    special=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 20_002), st.sampled_from([NAN, INF, -INF])),
        max_size=4,
    ),
    seed=st.integers(0, 2**16),
)
def test_the_likeliest_is_that_of_torch(
    way: str,
    rows: int,
    width: int,
    spread: float,
    special: list[tuple[int, int, float]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, width, generator=generator).mul(spread).round()  # so there are ties
    for row, column, value in special:
        if row < rows:
            scores[row, column % width] = value
    check(way, scores)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 17, 5000])
def test_rows_without_a_finite_maximum_have_no_probabilities(way: str, width: int) -> None:
    rows = [
        torch.full((width,), -INF),
        torch.full((width,), INF),
        torch.full((width,), NAN),
        torch.full((width,), -INF).index_fill(0, torch.tensor([width - 1]), NAN),
        torch.full((width,), INF).index_fill(0, torch.tensor([width // 2]), NAN),
        torch.full((width,), -3e38).index_fill(0, torch.tensor([width - 1]), 3e38),
    ]
    scores = torch.stack(rows)
    check(way, scores)
    drawn = choose(way, scores, torch.full((len(rows),), 0.5, dtype=torch.float64))
    assert drawn.ids.tolist() == expected(scores).ids.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("draw", [-1.0, 0.0, 0.7, 1 - 2.0**-53])
def test_the_only_token_that_is_allowed_is_certain(way: str, draw: float) -> None:
    scores = torch.full((1, 32_000), -INF)
    scores[0, 31_999] = -7.5
    chosen = choose(way, scores, torch.tensor([draw], dtype=torch.float64))
    assert [part.item() for part in chosen] == [31_999, 0.0, -7.5, 0.0]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(
    draws=st.lists(
        st.one_of(st.just(-1.0), st.just(0.0), st.just(1 - 2.0**-53), st.floats(0, 0.999)),
        min_size=1,
        max_size=6,
    ),
    width=widths,
    allowed=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**16),
)
def test_a_draw_chooses_the_token_at_its_cumulative_probability(
    way: str, draws: list[float], width: int, allowed: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(draws), width, generator=generator) * 4
    scores[torch.rand(scores.shape, generator=generator) > allowed] = -INF
    scores[:, seed % width] = 1.0
    chosen = choose(way, scores, torch.tensor(draws, dtype=torch.float64))
    mass = (scores.double() - scores.amax(1, keepdim=True)).exp().cumsum(1)
    mass /= mass[:, -1:].clone()
    logprobs = scores.double().log_softmax(1)
    for row, (token, draw) in enumerate(zip(chosen.ids.tolist(), draws, strict=True)):
        assert chosen.logprobs[row].item() == pytest.approx(logprobs[row, token].item(), abs=1e-5)
        if draw < 0:
            assert token == scores[row].argmax().item()
        else:
            assert scores[row, token] > -INF
            before = mass[row, token - 1].item() if token else 0.0
            assert before - 1e-5 <= draw <= mass[row, token].item() + 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_draws_follow_the_probabilities_across_slices(way: str) -> None:
    """Over 9000 tokens, of which those with even ids are three times as likely."""
    scores = torch.zeros(1, 9000)
    scores[:, ::2] = math.log(3.0)
    count = 64 if way == "triton" else 4096
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = choose(way, scores.repeat(count, 1), draws).ids
    assert ids.tolist() == sorted(ids.tolist())
    torch.testing.assert_close(ids / 9000, draws.float(), atol=2e-4, rtol=0)
    assert (ids % 2 == 0).float().mean().item() == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("draws", [False, True])
def test_a_row_does_not_depend_on_other_rows_or_threads(target: str, *, draws: bool) -> None:
    kernels = kernels_for(target)
    scores = torch.randn(7, 12_345) * 3
    numbers = torch.rand(7, dtype=torch.float64) if draws else None
    together = kernels.choose(scores, numbers)
    for count in (1, 2, 3):
        with threads(count):
            for row in range(len(scores)):
                number = None if numbers is None else numbers[row : row + 1]
                alone = kernels.choose(scores[row : row + 1], number)
                for part, whole in zip(alone, together, strict=True):
                    assert torch.equal(part, whole[row : row + 1])


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_slices_of_wider_ones(way: str) -> None:
    wide = torch.randn(4, 10_000)
    check(way, wide[1:3, 77:9000])


def test_draws_may_be_strided() -> None:
    scores, wide = torch.randn(5, 900), torch.rand(5, 4, dtype=torch.float64)
    apart = choose("whole", scores, wide[:, 1])
    assert torch.equal(apart.ids, choose("whole", scores, wide[:, 1].clone()).ids)


@pytest.mark.parametrize("way", ["whole", "triton"])
def test_other_layouts_and_dtypes_are_refused(way: str) -> None:
    for scores in (torch.randn(4, 8).t(), torch.randn(2, 8).double(), torch.empty(2, 0)):
        with pytest.raises(ValueError, match="fp32"):
            choose(way, scores)


def test_draws_of_other_shapes_and_dtypes_are_refused() -> None:
    for draws in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="fp64 draw for each row"):
            choose("whole", torch.randn(3, 8), draws)
