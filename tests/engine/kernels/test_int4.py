"""Int4 linear layers on the CPU, compared with double precision, for all instruction sets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels.int4 import PackedInt4Linear, group_weight
from engine.kernels.int8 import quantize_rows
from engine.model.quantized_linear import Int4Linear
from tests.engine.model.quantized import relative_error
from tests.engine.native import TARGETS, kernels_for


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    """Rows [rows, N] by the definition of the format, in double precision."""
    levels, scales, least = group_weight(linear.weight.detach())
    groups = levels.unflatten(1, (scales.shape[1], -1)).double()
    weight = groups * scales.bfloat16().unsqueeze(-1) + least.bfloat16().unsqueeze(-1)
    rows, row_scales = quantize_rows(x)
    exact = rows.double() @ weight.flatten(1).T * row_scales
    return exact if linear.bias is None else exact + linear.bias.detach()


def even(linear: nn.Linear) -> nn.Linear:
    """The layer with weights that have 4 bits already, in groups of 32."""
    groups = linear.weight.data.unflatten(1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 7
    linear.weight.data = ((groups / scales).round() * scales).flatten(1)
    return linear


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(
    rows=st.one_of(st.integers(1, 32), st.integers(1, 250)),
    halves=st.one_of(st.integers(1, 6), st.integers(30, 68)),  # of groups of 64
    out_features=st.integers(1, 150),
    is_even=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_the_rounded_numbers_and_a_row_ignores_the_others(
    target: str,
    rows: int,
    halves: int,
    out_features: int,
    is_even: bool,
    has_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(32 * halves, out_features, bias=has_bias)
    layer = PackedInt4Linear.from_linear(even(linear) if is_even else linear, kernels_for(target))
    has_small_groups = is_even or halves % 2 == 1
    assert layer.quantized.groups.shape[1] == (halves if has_small_groups else halves // 2)
    x = torch.randn(rows, 32 * halves)
    y = layer(x)
    torch.testing.assert_close(y.double(), product(x, linear), atol=3e-6, rtol=1e-5)
    row = seed % rows
    assert torch.equal(layer(x[row : row + 1]), y[row : row + 1])


def test_all_instruction_sets_give_the_same_bits() -> None:
    linear, x = nn.Linear(1600, 130), torch.randn(29, 1600)
    expected = PackedInt4Linear.from_linear(linear, kernels_for("whole"))(x)
    for target in TARGETS:
        assert torch.equal(PackedInt4Linear.from_linear(linear, kernels_for(target))(x), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_sums_of_the_largest_levels_do_not_overflow(target: str) -> None:
    linear = nn.Linear(4096, 33, bias=False)
    linear.weight.data[:] = 15.0
    linear.weight.data[:, ::32] = 0.0  # so that the levels are 0 and 15
    layer = PackedInt4Linear.from_linear(linear, kernels_for(target))
    for sign in (1.0, -1.0):
        y = layer(torch.full((2, 4096), sign))
        torch.testing.assert_close(y, torch.full((2, 33), sign * 15 * 31 * 128))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_in_that_row_only(target: str, poison: float) -> None:
    layer = PackedInt4Linear.from_linear(nn.Linear(128, 40), kernels_for(target))
    x = torch.randn(3, 128)
    clean = layer(x)
    x[1, 5] = poison
    dirty = layer(x)
    assert torch.equal(dirty[::2], clean[::2])
    assert dirty[1].isnan().all()


def test_rows_of_zeros_give_the_bias() -> None:
    linear = nn.Linear(64, 40)
    layer = PackedInt4Linear.from_linear(linear, kernels_for("whole"))
    assert torch.equal(layer(torch.zeros(2, 64)), linear.bias.detach().expand(2, -1))


def test_weights_are_those_of_torchs_layer() -> None:
    linear = nn.Linear(256, 64, bias=False)
    native = PackedInt4Linear.from_linear(linear, kernels_for("whole"))
    columns = torch.eye(256)
    plain = Int4Linear.from_linear(linear)
    assert relative_error(native(columns), plain(columns)) < 0.01


def test_layer_takes_any_leading_shape_and_whole_groups_only() -> None:
    layer = PackedInt4Linear.from_linear(nn.Linear(64, 24), kernels_for("whole"))
    for shape in ((64,), (2, 450, 64), (0, 64), (3, 1, 2, 64)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)
    transposed = torch.randn(64, 7).T
    assert torch.equal(layer(transposed), layer(transposed.contiguous()))
    for wrong in (torch.randn(2, 128), torch.randn(2, 64).double()):
        with pytest.raises(ValueError, match="fp32 input of width 64"):
            layer(wrong)
    assert PackedInt4Linear.fits(torch.empty(5, 96))
    assert not PackedInt4Linear.fits(torch.empty(64, 80))
