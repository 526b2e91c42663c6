"""Layers with a state by the C kernels: as by transformers, however a text is divided."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as stock

from engine.model import state_kernels
from tests.engine.native import TARGETS, kernels_for, threads

# Of key heads, heads, key and value: heads alone and in groups, values of no whole panel.
SIZES = [(2, 4, 16, 16), (3, 3, 4, 40), (1, 6, 128, 7)]


def tokens(batch: int, count: int, size: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Random query, key, value, decay as a logarithm, and beta of some tokens."""
    key_heads, heads, key_size, value_size = size
    torch.manual_seed(count)
    return {
        "query": torch.randn(batch, count, key_heads, key_size),
        "key": torch.randn(batch, count, key_heads, key_size),
        "value": torch.randn(batch, count, heads, value_size),
        "g": -torch.rand(batch, count, heads),
        "beta": torch.rand(batch, count, heads),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 70])
def test_the_gated_delta_rule_is_that_of_transformers(
    size: tuple[int, int, int, int], count: int, target: str
) -> None:
    rule = partial(state_kernels.gated_delta_rule, kernels_for(target))
    given, state = tokens(3, count, size), torch.randn(3, size[1], *size[2:])
    before = state.clone()
    for initial in (state, None):
        options = {"initial_state": initial, "output_final_state": True}
        for has_norms in (True, False):
            scale = 1.0 if has_norms else size[2] ** -0.5  # so that states stay small
            scaled = {**given, "key": given["key"] * scale}
            found = rule(**scaled, **options, use_qk_l2norm_in_kernel=has_norms)
            expected = stock.torch_recurrent_gated_delta_rule(
                **scaled, **options, use_qk_l2norm_in_kernel=has_norms
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(state, before)
    assert rule(**given)[1] is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_states_do_not_depend_on_how_a_text_is_divided(
    size: tuple[int, int, int, int], target: str
) -> None:
    rule = partial(state_kernels.gated_delta_rule, kernels_for(target))
    given = tokens(2, 90, size)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with threads(1):
        whole, last = rule(**given, **options)
    for number, ends in enumerate(([*range(1, 91)], [3, 67, 90], [64, 65, 90])):
        state: Tensor | None = None
        parts = []
        with threads(1 + number):
            for low, high in pairwise([0, *ends]):
                part = {name: x[1:, low:high] for name, x in given.items()}
                found, state = rule(**part, **options, initial_state=state)
                parts.append(found)
        assert torch.equal(torch.cat(parts, dim=1), whole[1:])
        assert state is not None
        assert torch.equal(state, last[1:])


def test_what_does_not_fit_together_is_refused() -> None:
    kernels = kernels_for("whole")
    x, head, state = torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3), torch.zeros(1, 3, 6, 6)
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.gated_delta_rule(x, x, x, head, head, state)  # 6 is no multiple of 4
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.causal_conv(torch.zeros(1, 3, 8), torch.zeros(4, 2))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_convolutions_are_those_of_transformers(
    count: int, activation: str | None, target: str
) -> None:
    kernels = kernels_for(target)
    torch.manual_seed(count)
    x, weight, bias = torch.randn(2, 5, count), torch.randn(5, 4), torch.randn(5)
    for b in (None, bias):
        found = state_kernels.causal_conv(kernels, x, weight, b, activation)
        torch.testing.assert_close(found, stock.causal_conv1d_fn(x, weight, b, activation))
        ours, theirs = torch.randn(2, 5, 4).expand(2, 2, 5, 4).clone().unbind(0)
        found = state_kernels.causal_conv_update(kernels, x, ours, weight, b, activation)
        expected = stock.causal_conv1d_update(x, theirs, weight, b, activation)
        torch.testing.assert_close(found, expected)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("target", TARGETS)
def test_convolutions_of_a_token_are_those_of_the_text(target: str) -> None:
    kernels = kernels_for(target)
    x, weight = torch.randn(3, 50, 103), torch.randn(50, 4)
    whole = kernels.causal_conv(x, weight, silu=True)
    for num_threads, (low, high) in enumerate([(7, 8), (0, 33), (40, 100)], start=1):
        with threads(num_threads):
            part = kernels.causal_conv(x[1:2, :, low : high + 3], weight, silu=True)
        assert torch.equal(part, whole[1:2, :, low:high])
    exact = F.conv1d(x.double(), weight.double().unsqueeze(1), groups=50)
    torch.testing.assert_close(whole, F.silu(exact).float())
