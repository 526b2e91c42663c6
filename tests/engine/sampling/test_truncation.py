"""Temperature, top-k, top-p and typical-p: all kernels compared with a sort in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.sampling.truncation import in_torch
from tests.engine.native import TARGETS, kernels_for, threads
from tests.engine.on_device import DEVICE

NAN, INF = math.nan, math.inf
WAYS = [*TARGETS, "triton", "torch"]


Limits = tuple[float, float, float, float]  # temperature, top-k, top-p, typical-p


def truncate(way: str, scores: Tensor, limits: list[Limits]) -> Tensor:
    """The truncated scores; each row has its own limits."""
    rows = torch.tensor(limits).T.contiguous()
    scores = scores.clone()
    if way == "torch":
        return in_torch(scores, rows)
    if way == "triton":
        module = pytest.importorskip("engine.kernels.triton_sampling")
        with np.errstate(all="ignore"):  # the interpreter warns; a GPU does not
            scores = scores.to(DEVICE)
            module.truncate(scores, rows.to(DEVICE))
            scores = scores.cpu()
    else:
        kernels_for(way).truncate(scores, rows)
    return scores


def kept(scores: Tensor) -> list[int]:
    """The ids of a row that are kept."""
    return (scores > -INF).nonzero().flatten().tolist()


def check(scores: Tensor, actual: Tensor, limits: Limits) -> None:
    """Checks one row. Scores at the edge of a share may be kept or not, since sums round."""
    temperature, top_k, top_p, typical_p = limits
    scores = scores / torch.tensor(temperature)
    left = torch.tensor(kept(actual), dtype=torch.int64)
    assert torch.equal(actual[left], scores[left]), "kept scores are only divided"
    if top_k < len(scores):
        kth = scores.sort(descending=True).values[max(int(top_k), 1) - 1]
        scores = torch.where(scores < kth, -INF, scores)
    certain = possible = scores
    if top_p < 1:
        certain, possible = cut(scores, -scores, top_p)
    if typical_p < 1:
        if kept(certain) != kept(possible):
            return  # the mean depends on which of them are kept
        double = certain.double()
        mean = (double.softmax(0) * double).nansum()
        certain, possible = cut(certain, (double - mean).abs(), typical_p)
    assert set(kept(certain)) <= set(left.tolist()) <= set(kept(possible))
    assert len(left) >= 1


def cut(scores: Tensor, order: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The scores that must be kept, and those that may be: the first of an order, up to a share.

    Scores next to the edge, by their mass or in the order, may be kept or not.
    """
    indices = order.sort(stable=True).indices
    probs = scores.double().softmax(0)[indices]
    before = probs.cumsum(0) - probs
    must = (probs > 1e-30) & (before < share - 1e-5)
    may = (probs > 0) & (before < share + 1e-5)
    must[0] = may[0] = True
    edges = order[indices[must != may]]
    if len(edges):
        near = (order[indices] - edges.min()).abs() < 1e-4 * (1 + edges.min().abs())
        must &= ~near | (torch.arange(len(must)) == 0)
        may |= near & (probs > 0)
    return keep(scores, indices[must]), keep(scores, indices[may])


def keep(scores: Tensor, ids: Tensor) -> Tensor:
    return torch.full_like(scores, -INF).index_copy(0, ids, scores[ids])


@dataclass(frozen=True)
class Case:
    """Rows with their limits."""

    scores: Tensor
    limits: list[Limits]

    def check(self, way: str) -> None:
        result = truncate(way, self.scores, self.limits)
        for row, limit in enumerate(self.limits):
            check(self.scores[row], result[row], limit)


temperatures = st.sampled_from([1.0, 0.3, 1.7])
top_ks = st.one_of(st.sampled_from([INF, 1.0, 2.0, 50.0]), st.integers(1, 4000).map(float))
shares = st.one_of(st.sampled_from([1.0, 1e-6, 0.5, 0.95]), st.floats(0.01, 0.999))


@st.composite
def cases(draw: st.DrawFn, max_rows: int = 5) -> Case:
    """Flat and peaked distributions, with and without ties, some with tokens of score -inf."""
    limits = draw(
        st.lists(st.tuples(temperatures, top_ks, shares, shares), min_size=1, max_size=max_rows)
    )
    width = draw(st.one_of(st.integers(1, 300), st.sampled_from([4096, 4097, 20_003])))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(limits), width, generator=generator)
    scores *= draw(st.sampled_from([0.0, 0.1, 3.0, 30.0, 1e4]))
    if draw(st.booleans()):
        scores = scores.round()
    scores[torch.rand(scores.shape, generator=generator) > draw(st.floats(0.001, 1.0))] = -INF
    scores[:, seed % width] = 0.5
    return Case(scores, limits)


@pytest.mark.parametrize("way", [*TARGETS, "torch"])
@settings(max_examples=80)
@given(case=cases())
def test_kept_scores_are_those_of_a_sort(way: str, case: Case) -> None:
    case.check(way)


@settings(max_examples=15)
@given(case=cases(max_rows=2))
def test_kept_scores_on_a_gpu_are_those_of_a_sort(case: Case) -> None:
    case.check("triton")


@pytest.mark.parametrize("way", WAYS)
def test_of_equal_scores_at_the_share_the_first_are_kept(way: str) -> None:
    scores = torch.zeros(2, 1000)
    scores[1, 500] = 2.0
    result = truncate(way, scores, [(1.0, INF, 0.0995, 1.0), (1.0, INF, 0.05, 1.0)])
    assert kept(result[0]) == [*range(100)]
    # Token 500 holds 0.73 % of the mass, so 43 of the other tokens are needed.
    assert kept(result[1]) == [*range(43), 500]


@pytest.mark.parametrize("way", WAYS)
def test_scores_equal_to_the_kth_largest_are_kept(way: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(truncate(way, scores, [(1.0, 2.0, 1.0, 1.0)])[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("way", WAYS)
def test_limits_that_drop_nothing_change_nothing(way: str) -> None:
    scores = torch.randn(3, 5000)
    assert torch.equal(truncate(way, scores, [(1.0, INF, 1.0, 1.0)] * 3), scores)
    assert torch.equal(truncate(way, scores, [(1.0, 5000.0, 1.5, 1.5)] * 3), scores)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_infinity_of_one_row_stay_in_it(way: str, value: float) -> None:
    scores = torch.randn(3, 700)
    good = truncate(way, scores, [(0.5, 3.0, 0.9, 0.9)] * 3)
    scores[1, 13] = value
    result = truncate(way, scores, [(0.5, 3.0, 0.9, 0.9)] * 3)
    assert result[1].log_softmax(0).isnan().any()
    assert torch.equal(result[::2], good[::2])


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_a_finite_score_are_not_changed(way: str) -> None:
    scores = torch.full((1, 700), -INF)
    assert torch.equal(truncate(way, scores, [(0.5, 3.0, 0.9, 0.9)]), scores)


@pytest.mark.parametrize("way", WAYS)
def test_scores_may_be_as_large_as_float32_allows(way: str) -> None:
    scores = torch.arange(-300, 300).unsqueeze(0) * 1e36
    assert kept(truncate(way, scores, [(1.0, 5.0, 1.0, 1.0)])[0]) == [*range(595, 600)]
    assert kept(truncate(way, scores, [(1.0, INF, 0.5, 1.0)])[0]) == [599]


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_does_not_depend_on_other_rows_or_threads(target: str) -> None:
    kernels = kernels_for(target)
    scores = torch.randn(7, 12_345) * 3
    limits = torch.tensor([[0.7, 1, 2, 1, 1, 1, 1], [50, INF] * 3 + [9], [0.9] * 7, [0.8] * 7])
    together = scores.clone()
    kernels.truncate(together, limits)
    for count in (1, 2, 3):
        with threads(count):
            for row in range(len(scores)):
                alone = scores[row : row + 1].clone()
                kernels.truncate(alone, limits[:, row : row + 1])
                assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_slices_of_wider_ones(way: str) -> None:
    wide = torch.randn(4, 10_000)
    part = wide[1:3, 77:9000]
    result = truncate(way, part, [(0.7, 50.0, 0.9, 0.9)] * 2)
    for row in range(2):
        check(part[row], result[row], (0.7, 50.0, 0.9, 0.9))


def test_other_layouts_and_dtypes_are_refused() -> None:
    kernels = kernels_for("whole")
    for scores in (torch.randn(4, 8).t(), torch.randn(2, 8).double(), torch.empty(2, 0)):
        with pytest.raises(ValueError, match="fp32 scores"):
            kernels.truncate(scores, torch.ones(4, len(scores)))
    for limits in (torch.ones(3, 4), torch.ones(4, 2), torch.ones(4, 4).double()):
        with pytest.raises(ValueError, match="four fp32 limits"):
            kernels.truncate(torch.randn(4, 8), limits)
