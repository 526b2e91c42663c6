"""Linear layers that multiply pairs of bfloat16, compared with double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from engine.kernels.bfloat16 import PackedBfloat16Linear
from engine.kernels.build import build_library
from engine.kernels.cpu import CpuKernels
from tests.engine.native import TARGETS, kernels_for


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("in_features", [1, 64, 65, 1023, 2100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_rounded_numbers(
    target: str, in_features: int, has_bias: bool
) -> None:
    linear, x = nn.Linear(in_features, 70, bias=has_bias), torch.randn(17, in_features)
    y = PackedBfloat16Linear.from_linear(linear, kernels_for(target))(x)
    exact = x.bfloat16().double() @ linear.weight.bfloat16().double().T
    if has_bias:
        exact += linear.bias
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1e-5)


def test_all_instruction_sets_give_the_same_bits() -> None:
    linear, x = nn.Linear(1601, 130), torch.randn(29, 1601)
    expected = PackedBfloat16Linear.from_linear(linear, kernels_for("whole"))(x)
    without = CpuKernels(
        build_library(("-mno-avx512bf16",) * kernels_for("whole").multiplies_pairs)
    )
    assert not without.multiplies_pairs
    for kernels in (without, *map(kernels_for, TARGETS)):
        assert torch.equal(PackedBfloat16Linear.from_linear(linear, kernels)(x), expected)


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    kernels = kernels_for("whole")
    layer = PackedBfloat16Linear.from_linear(nn.Linear(1, 1, bias=False), kernels)
    layer.quantized = layer.pack(torch.ones(1, 1), None, kernels)
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 2.0**-100, math.pi])
    x = torch.cat([halves, torch.randn(500) * 1e10]).unsqueeze(1)
    assert torch.equal(layer(x), x.bfloat16().float())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_changes_no_other(target: str, poison: float) -> None:
    layer = PackedBfloat16Linear.from_linear(nn.Linear(65, 40), kernels_for(target))
    x = torch.randn(3, 65)
    clean = layer(x)
    x[1, 5] = poison
    dirty = layer(x)
    assert torch.equal(dirty[::2], clean[::2])
    assert not dirty[1].isfinite().any()


def test_layer_takes_any_leading_shape_and_its_own_width_only() -> None:
    layer = PackedBfloat16Linear.from_linear(nn.Linear(63, 24), kernels_for("whole"))
    assert layer(torch.randn(2, 0, 63)).shape == (2, 0, 24)
    x = torch.randn(2, 3, 63)
    assert torch.equal(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
    with pytest.raises(ValueError, match="expected input of width 64, and pairs"):
        layer(torch.randn(2, 65))
    with pytest.raises(ValueError, match="expected fp32 input"):
        layer(torch.randn(2, 63).double())
