"""Rows of tokens sorted by expert, and their results weighed, compared with torch."""

from __future__ import annotations

import pytest
import torch

from tests.engine.native import TARGETS, kernels_for, threads


def routed(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (7, 128, 8), (300, 5, 1)]
)
def test_rows_are_sorted_by_expert_and_within_one_by_token(
    num_tokens: int, num_experts: int, top_k: int
) -> None:
    index = routed(num_tokens, num_experts, top_k)
    ends, tokens, places = kernels_for("whole").sort_by_expert(index, num_experts)
    experts, order = index.flatten().sort(stable=True)
    assert torch.equal(ends, torch.bincount(experts, minlength=num_experts).cumsum(0))
    assert torch.equal(tokens, order // top_k)
    assert torch.equal(places.flatten()[order], torch.arange(len(order)))


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_is_not_there_is_an_error(expert: int) -> None:
    with pytest.raises(IndexError, match="sort_by_expert"):
        kernels_for("whole").sort_by_expert(torch.tensor([[0, expert]]), 4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [3, 64, 333])
def test_results_are_weighed_for_each_token_alone(target: str, width: int) -> None:
    kernels = kernels_for(target)
    index, weights = routed(500, 6, 3), torch.rand(500, 3)
    _, tokens, places = kernels.sort_by_expert(index, 6)
    x = torch.randn(len(tokens), width)
    with threads(2):
        y = kernels.weigh_rows(x, places, weights)
    expected = (x.double()[places] * weights.double().unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-5)
    for token in (0, 250, 499):
        row = slice(token, token + 1)
        alone = kernels.weigh_rows(x[places[token]], torch.arange(3).unsqueeze(0), weights[row])
        assert torch.equal(alone, y[row])


def test_weights_for_other_choices_are_refused() -> None:
    kernels = kernels_for("whole")
    with pytest.raises(ValueError, match="for each choice"):
        kernels.weigh_rows(
            torch.randn(4, 8), torch.zeros(2, 2, dtype=torch.int64), torch.rand(2, 3)
        )
