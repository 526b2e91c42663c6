"""Maximum, its place and the norm of score rows, in one pass: as torch has them, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.row_statistics import Statistics, in_torch
from tests.engine.native import TARGETS, kernels_for, threads

NAN, INF = math.nan, math.inf
WAYS = [*TARGETS, "triton", "torch"]


def expected(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = scores.amax(dim=-1)
    norm = torch.logsumexp((scores - top.unsqueeze(1)).double(), dim=-1).float()
    return top, scores.argmax(dim=-1), norm


def compute(way: str, scores: Tensor) -> Statistics:
    if way == "torch":
        return in_torch(scores)
    if way == "triton":
        module = pytest.importorskip("engine.kernels.triton_sampling")
        with np.errstate(over="ignore"):  # of the interpreter; a GPU has no warnings
            return module.row_statistics(scores)  # type: ignore[no-any-return]
    return kernels_for(way).row_statistics(scores)


def check(way: str, scores: Tensor) -> None:
    for got, wanted in zip(compute(way, scores), expected(scores), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=3e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    width=st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 4097, 9000, 20_003])),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    special=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 20_002), st.sampled_from([NAN, INF, -INF])),
        max_size=4,
    ),
    seed=st.integers(0, 2**16),
)
def test_are_those_of_torch(
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
def test_of_rows_without_a_finite_maximum(way: str, width: int) -> None:
    rows = [
        torch.full((width,), -INF),
        torch.full((width,), INF),
        torch.full((width,), NAN),
        torch.full((width,), -INF).index_fill(0, torch.tensor([width - 1]), NAN),
        torch.full((width,), INF).index_fill(0, torch.tensor([width // 2]), NAN),
        torch.full((width,), -3e38).index_fill(0, torch.tensor([width - 1]), 3e38),
    ]
    check(way, torch.stack(rows))


@pytest.mark.parametrize("way", WAYS)
def test_of_one_token_that_is_allowed_are_exact(way: str) -> None:
    scores = torch.full((1, 32_000), -INF)
    scores[0, 31_999] = -7.5
    top, argmax, norm = compute(way, scores)
    assert (top.item(), argmax.item(), norm.item()) == (-7.5, 31_999, 0.0)


@pytest.mark.parametrize("target", TARGETS)
def test_depend_on_the_row_alone(target: str) -> None:
    kernels = kernels_for(target)
    scores = torch.randn(7, 12_345) * 3
    together = kernels.row_statistics(scores)
    for count in (1, 2, 3):
        with threads(count):
            for row in range(len(scores)):
                alone = kernels.row_statistics(scores[row : row + 1])
                for part, whole in zip(alone, together, strict=True):
                    assert torch.equal(part, whole[row : row + 1])


@pytest.mark.parametrize("way", WAYS)
def test_of_slices_of_wider_rows(way: str) -> None:
    wide = torch.randn(4, 10_000)
    check(way, wide[1:3, 77:9000])


@pytest.mark.parametrize("way", ["whole", "triton"])
def test_refuse_what_cannot_be_read(way: str) -> None:
    for scores in (torch.randn(4, 8).t(), torch.randn(2, 8).double(), torch.empty(2, 0)):
        with pytest.raises(ValueError, match="fp32"):
            compute(way, scores)
