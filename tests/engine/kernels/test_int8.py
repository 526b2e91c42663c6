"""Int8 linear layers on the CPU, compared with numpy and torch, for all instruction sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels.int8 import MAX_IN_FEATURES, PackedInt8Linear, pack_int8, quantize_rows
from engine.model.quantized_linear import Int8Linear
from tests.engine.native import TARGETS, kernels_for

Floats = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def rounded(x: Tensor) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], Floats]:
    """The levels and scales of rows, by their definition."""
    values: Floats = x.numpy()
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(values / scales).astype(np.int64), scales


def product(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 [rows, N], with sums in 64-bit integers."""
    (levels, scales), (weights, channels) = rounded(x), rounded(weight)
    sums = (levels @ weights.T).astype(np.float32)
    return torch.from_numpy(sums * (scales * channels.T))


cases = given(
    rows=st.one_of(st.integers(1, 32), st.integers(1, 400)),
    in_features=st.one_of(st.integers(1, 70), st.integers(1000, 2100)),
    out_features=st.integers(1, 150),
    spread=st.sampled_from([1e-15, 1.0, 1e15]),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=30)
@cases
def test_product_is_exact_and_a_row_ignores_the_others(
    target: str, rows: int, in_features: int, out_features: int, spread: float, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=False)
    layer = PackedInt8Linear.from_linear(linear, kernels_for(target))
    x = torch.randn(rows, in_features) * spread
    y = layer(x)
    assert torch.equal(y, product(x, linear.weight.detach()))
    row = seed % rows
    assert torch.equal(layer(x[row : row + 1]), y[row : row + 1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_equal_those_of_torch(target: str, rows: int) -> None:
    linear = nn.Linear(264, 72)
    native, plain = PackedInt8Linear.from_linear(linear, kernels_for(target)), Int8Linear(linear)
    x = torch.randn(2, rows, 264)
    torch.testing.assert_close(native(x), plain(x), atol=1e-6, rtol=1e-6)
    linear.bias = None
    native, plain = PackedInt8Linear.from_linear(linear, kernels_for(target)), Int8Linear(linear)
    assert torch.equal(native(x), plain(x))


def test_sums_at_their_limits_do_not_overflow() -> None:
    kernels = kernels_for("whole")
    for sign in (1.0, -1.0):
        weight = torch.full((1, MAX_IN_FEATURES), sign)
        y = kernels.int8_linear(-weight, pack_int8(weight, None, kernels), 1)
        assert y.item() == pytest.approx(-MAX_IN_FEATURES, rel=1e-6)
    with pytest.raises(ValueError, match="at most"):
        pack_int8(torch.ones(1, MAX_IN_FEATURES + 1), None, kernels)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_in_that_row_only(target: str, poison: float) -> None:
    linear = nn.Linear(64, 40)
    layer, plain = PackedInt8Linear.from_linear(linear, kernels_for(target)), Int8Linear(linear)
    x = torch.randn(3, 64)
    clean = layer(x)
    x[1, 5] = poison
    dirty = layer(x)
    assert torch.equal(dirty[::2], clean[::2])
    assert dirty[1].isnan().all()
    assert not plain(x)[1].isfinite().any()


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_zeros_give_the_bias(target: str) -> None:
    linear = nn.Linear(33, 40)
    linear.weight.data[7] = 0.0
    layer = PackedInt8Linear.from_linear(linear, kernels_for(target))
    x = torch.stack([torch.zeros(33), torch.full((33,), 1e-39), torch.randn(33)])
    y = layer(x)
    assert torch.equal(y[:2], linear.bias.detach().expand(2, -1))
    assert y[2, 7] == linear.bias[7]


def test_layer_takes_any_leading_shape() -> None:
    layer = PackedInt8Linear.from_linear(nn.Linear(40, 24), kernels_for("whole"))
    for shape in ((40,), (2, 450, 40), (0, 40), (3, 1, 2, 40)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)
    transposed = torch.randn(40, 7).T
    assert torch.equal(layer(transposed), layer(transposed.contiguous()))
    with pytest.raises(ValueError, match="fp32 input of width 40"):
        layer(torch.randn(2, 44))
    with pytest.raises(ValueError, match="fp32 input of width 40"):
        layer(torch.randn(2, 40).double())


def test_levels_are_rounded_to_the_nearest() -> None:
    x = torch.randn(50, 300) * torch.logspace(-20, 20, 50).unsqueeze(1)
    levels, scales = quantize_rows(x)
    assert levels.abs().amax(dim=1).eq(127).all()
    assert ((levels * scales - x).abs() <= 0.501 * scales).all()
