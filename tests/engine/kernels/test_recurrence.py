"""Layers with a state by the C kernels: as by transformers, however a text is divided."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as stock

from engine.model import state_kernels, state_spaces
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 70])
def test_decays_of_each_key_are_those_of_kimi(count: int, target: str) -> None:
    given, state = tokens(3, count, (2, 2, 16, 40)), torch.randn(3, 2, 16, 40)
    given["g"] = -torch.rand(3, count, 2, 16)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "initial_state": state}
    found = state_kernels.gated_delta_rule(kernels_for(target), **given, **options)
    expected = kimi.recurrent_kimi_delta_attention(**given, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_values_without_a_delta_are_added_as_they_are(target: str) -> None:
    given = tokens(2, 30, (2, 2, 8, 20))
    names, state, expected = ("query", "key", "value"), torch.randn(2, 2, 8, 20), []
    inputs, decay = [given[name] for name in names], given["g"].exp()
    own = state.double()
    for n in range(30):
        query, key, value = (x[:, n].double() for x in inputs)
        own = own * decay[:, n, :, None, None] + key.unsqueeze(-1) * value.unsqueeze(-2)
        expected.append((query.unsqueeze(-1) * own).sum(-2))
    found = kernels_for(target).gated_delta_rule(*inputs, decay, None, state)
    torch.testing.assert_close(found, torch.stack(expected, dim=1).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, own.float(), atol=1e-4, rtol=1e-4)


# Of groups, heads, a head and what a state has of each of its numbers: blocks and vectors that are
# whole, and others.
SPACES = [(2, 4, 16, 16), (1, 3, 5, 8), (3, 3, 20, 21)]


def space(batch: int, count: int, size: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Random tokens of Mamba 2, and a layer's numbers."""
    groups, heads, head_size, state_size = size
    torch.manual_seed(count)
    return {
        "hidden_states": torch.randn(batch, count, heads, head_size),
        "dt": torch.randn(batch, count, heads),
        "A": -torch.rand(heads),
        "B": torch.randn(batch, count, groups, state_size),
        "C": torch.randn(batch, count, groups, state_size),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SPACES)
def test_scans_of_heads_are_those_of_transformers(
    size: tuple[int, int, int, int], target: str
) -> None:
    kernels, given = kernels_for(target), space(2, 70, size)
    options = {"chunk_size": 32, "dt_softplus": True, "return_final_states": True}
    options["dt_limit"] = (0.4, 2.0)
    for state in (None, torch.randn(2, *size[1:])):
        found = state_spaces.scan(kernels, **given, **options, initial_states=state)
        expected = mamba2.mamba2_chunk_scan(**given, **options, initial_states=state)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def single(given: dict[str, Tensor], at: int, state_size: int) -> dict[str, Tensor]:
    """A token as the function for single ones is given it."""
    head_size = given["hidden_states"].shape[-1]
    token = {name: given[name][:, at] for name in ("hidden_states", "B", "C")}
    token["dt"] = given["dt"][:, at, :, None].expand(-1, -1, head_size)
    token["A"] = given["A"][:, None, None].expand(-1, head_size, state_size)
    return token | {name: given[name][:, None].expand(-1, head_size) for name in ("D", "dt_bias")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SPACES)
def test_tokens_of_heads_are_those_of_transformers_and_of_scans(
    size: tuple[int, int, int, int], target: str
) -> None:
    kernels, given = kernels_for(target), space(2, 40, size)
    gates, limit = torch.randn(40, *size[1:3]), (0.4, 2.0)
    with threads(1):
        whole, last = state_spaces.scan(
            kernels, **given, dt_softplus=True, return_final_states=True, dt_limit=limit
        )
    ours, theirs = torch.zeros_like(last), torch.randn_like(last)
    for at in range(40):
        token, z = single(given, at, size[3]), gates[at]
        found = state_spaces.update(kernels, ours, **token, dt_softplus=True, dt_limit=limit)
        assert torch.equal(found, whole[:, at])
        mine = theirs.clone()
        found = state_spaces.update(kernels, mine, **token, dt_softplus=True, z=z)
        expected = mamba2.mamba2_selective_state_update(theirs, **token, dt_softplus=True, z=z)
        torch.testing.assert_close((found, mine), (expected, theirs), atol=1e-4, rtol=1e-4)
    assert torch.equal(ours, last)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("channels", "state_size"), [(64, 16), (37, 9)])
def test_scans_of_channels_are_those_of_transformers(
    channels: int, state_size: int, target: str
) -> None:
    kernels, batch, count = kernels_for(target), 2, 30
    torch.manual_seed(channels)
    rates, bias, skip = (
        -torch.rand(channels, state_size),
        torch.randn(channels),
        torch.randn(channels),
    )
    x, dt, z = torch.randn(3, batch, channels, count).unbind(0)
    given = torch.randn(2, batch, state_size, count).unbind(0)
    options = {"delta_softplus": True, "return_last_state": True}
    parts = (x, dt, rates, *given, skip, z, bias)
    with threads(1):
        found, last = state_spaces.scan_of_channels(kernels, *parts, **options)
    expected = mamba.mamba_selective_scan(*parts, **options)
    torch.testing.assert_close((found, last), expected, atol=1e-4, rtol=1e-4)
    state = torch.zeros_like(last)
    for at in range(count):
        token = (part[..., at] for part in (x, dt))
        given_at = (part[..., at] for part in given)
        single = state_spaces.update_of_channels(
            kernels, state, *token, rates, *given_at, skip, bias, True, z[..., at]
        )
        assert torch.equal(single, found[..., at])
    assert torch.equal(state, last)


def test_what_does_not_fit_together_is_refused() -> None:
    kernels = kernels_for("whole")
    x, head, state = torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3), torch.zeros(1, 3, 6, 6)
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.gated_delta_rule(x, x, x, head, head, state)  # 6 is no multiple of 4
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.gated_delta_rule(x, x, x, x, None, torch.zeros(1, 3, 8, 6))
    with pytest.raises(ValueError, match="do not fit together"):
        kernels.selective_scan(x, head, x[0], (x, x), state)
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
