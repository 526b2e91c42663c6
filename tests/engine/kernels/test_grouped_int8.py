"""Int8 weights that keep their groups, compared with double precision and the file's blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels import build
from engine.kernels.cpu import CpuKernels
from engine.kernels.grouped_int8 import GroupedInt8Linear, find_groups, int8_linear
from engine.kernels.int8 import PackedInt8Linear, quantize_rows
from tests.engine.native import TARGETS, kernels_for, threads

KINDS = (Kind.Q8_0, Kind.Q5_0, Kind.Q4_0)


def blocks_of(weight: Tensor, kind: Kind) -> Any:
    """A weight [N, K] as a file has it: uint8 [N, K / 32 * bytes of a block]."""
    return quantize(weight.detach().numpy(), kind)


def stored(linear: nn.Linear, kind: Kind = Kind.Q8_0) -> nn.Linear:
    """The layer with the weight that transformers reads from a file."""
    values = dequantize(blocks_of(linear.weight, kind), kind)
    linear.weight.data = torch.from_numpy(values.copy())
    return linear


def product(x: Tensor, linear: nn.Linear) -> Tensor:
    """Rows [rows, N] with the file's weights and rounded activations, in double precision."""
    rows, scales = quantize_rows(x)
    exact = rows.double() @ linear.weight.detach().double().T * scales
    return exact if linear.bias is None else exact + linear.bias.detach()


def check_product(kernels: CpuKernels, linear: nn.Linear, rows: int) -> None:
    """That a layer gives the product, and a row the same bits alone."""
    layer = GroupedInt8Linear.from_linear(linear, kernels)
    x = torch.randn(rows, linear.in_features)
    y = layer(x)
    torch.testing.assert_close(y.double(), product(x, linear), atol=3e-6, rtol=1e-5)
    assert torch.equal(layer(x[rows // 2 : rows // 2 + 1]), y[rows // 2 : rows // 2 + 1])


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20)
@given(
    rows=st.one_of(st.integers(1, 32), st.integers(1, 250)),
    groups=st.one_of(st.integers(1, 5), st.integers(31, 66)),
    out_features=st.integers(1, 150),
    kind=st.sampled_from(KINDS),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_the_files_numbers_and_a_row_ignores_the_others(
    target: str, rows: int, groups: int, out_features: int, kind: Kind, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = stored(nn.Linear(32 * groups, out_features, bias=has_bias), kind)
    check_product(kernels_for(target), linear, rows)


def test_processors_without_avx_and_float16_compute_the_same_product() -> None:
    kernels_for("whole")
    kernels = CpuKernels(build.build_library(("-mno-avx", "-O1")))
    torch.manual_seed(2)
    for rows in (1, 9):
        check_product(kernels, stored(nn.Linear(1120, 50)), rows)


def test_all_instruction_sets_and_numbers_of_threads_give_the_same_bits() -> None:
    linear, x = stored(nn.Linear(1600, 130)), torch.randn(250, 1600)
    expected = GroupedInt8Linear.from_linear(linear, kernels_for("whole"))(x)
    for count in (1, 2, 3):
        with threads(count):
            layer = GroupedInt8Linear.from_linear(linear, kernels_for("whole"))
            assert torch.equal(layer(x), expected)
    for target in TARGETS:
        assert torch.equal(GroupedInt8Linear.from_linear(linear, kernels_for(target))(x), expected)


def test_levels_and_scales_are_the_files_bytes() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 1100)  # more rows than are looked at together
    linear.weight.data *= torch.logspace(-6, 3, 1100).unsqueeze(1)  # some scales are subnormal
    linear.weight.data[5, 32:64] = 0.0
    blocks = torch.from_numpy(blocks_of(linear.weight, Kind.Q8_0).copy()).view(1100, -1, 34)
    groups = find_groups(stored(linear).weight.detach())
    assert groups is not None
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    assert torch.equal(groups.scales, scales)
    levels = blocks[..., 2:].contiguous().view(torch.int8)
    assert torch.equal(groups.levels.view_as(levels), levels * (scales > 0).unsqueeze(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_found_again_without_rounding(kind: Kind) -> None:
    torch.manual_seed(1)
    weight = stored(nn.Linear(512, 64), kind).weight.detach()
    groups = find_groups(weight)
    assert groups is not None
    levels = groups.levels.float().unflatten(1, (-1, 32))
    assert torch.equal((levels * groups.scales.float().unsqueeze(-1)).flatten(1), weight)


def test_groups_whose_largest_level_is_not_127_are_found() -> None:
    levels = torch.randint(-90, 91, (20, 32)).float()
    levels[:, 0] = 101
    assert find_groups(levels * 0.25) is not None


@pytest.mark.parametrize("kind", [None, Kind.Q4_1, Kind.Q5_1, Kind.F16])
def test_other_weights_are_rounded_by_row(kind: Kind | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 40)
    if kind is not None:
        stored(linear, kind)
    kernels = kernels_for("whole")
    assert type(int8_linear(linear, kernels)) is PackedInt8Linear
    with pytest.raises(ValueError, match="not of integers and float16 scales"):
        GroupedInt8Linear.from_linear(linear, kernels)


def test_a_weight_without_whole_groups_or_with_one_wrong_number_has_none() -> None:
    weight = stored(nn.Linear(64, 40)).weight.detach()
    assert find_groups(weight[:, :48]) is None
    weight[39, 63] *= 1.001
    assert find_groups(weight) is None


def test_sums_of_the_largest_levels_do_not_overflow() -> None:
    linear = nn.Linear(4096, 33, bias=False)
    linear.weight.data[:] = 127.0
    for target in TARGETS:
        layer = GroupedInt8Linear.from_linear(linear, kernels_for(target))
        for sign in (1.0, -1.0):
            y = layer(torch.full((2, 4096), sign))
            torch.testing.assert_close(y, torch.full((2, 33), sign * 127 * 4096))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_in_that_row_only(target: str, poison: float) -> None:
    layer = GroupedInt8Linear.from_linear(stored(nn.Linear(128, 40)), kernels_for(target))
    x = torch.randn(3, 128)
    clean = layer(x)
    x[1, 5] = poison
    dirty = layer(x)
    assert torch.equal(dirty[::2], clean[::2])
    assert dirty[1].isnan().all()


def test_rows_of_zeros_give_the_bias_and_any_leading_shape_is_taken() -> None:
    linear = stored(nn.Linear(64, 24))
    layer = GroupedInt8Linear.from_linear(linear, kernels_for("whole"))
    assert torch.equal(layer(torch.zeros(2, 64)), linear.bias.detach().expand(2, -1))
    for shape in ((64,), (2, 450, 64), (0, 64), (3, 1, 2, 64)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)
    for wrong in (torch.randn(2, 128), torch.randn(2, 64).double()):
        with pytest.raises(ValueError, match="fp32 input of width 64"):
            layer(wrong)
