"""Packed linear layers in fp32, and models whose linear layers are packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels.cpu import CpuKernels
from engine.kernels.packed_linear import PackedLinear, pack_model
from tests.engine.kernels.linear_checks import check_linear
from tests.engine.native import TARGETS, kernels_for, needs_compiler

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
linear_cases = {
    "rows": st.one_of(st.integers(1, 32), st.integers(1, 300)),
    "in_features": st.one_of(st.integers(1, 70), st.integers(500, 1100)),
    "out_features": st.integers(1, 200),
    "has_bias": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@needs_compiler
@relaxed
@given(**linear_cases)
def test_packed_linear_equals_linear_and_ignores_other_rows(
    kernels: CpuKernels, rows: int, in_features: int, out_features: int, has_bias: bool, seed: int
) -> None:
    check_linear(kernels, rows, in_features, out_features, has_bias, seed)


@needs_compiler
@settings(relaxed, max_examples=25)
@given(**linear_cases)
def test_packed_linear_equals_linear_with_narrow_vectors(
    narrow_kernels: CpuKernels,
    rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    seed: int,
) -> None:
    check_linear(narrow_kernels, rows, in_features, out_features, has_bias, seed)


@needs_compiler
@pytest.mark.skipif(not _HUGE_PAGES.exists(), reason="this system has no huge pages on request")
def test_results_too_large_to_be_kept_by_the_heap_are_on_huge_pages(kernels: CpuKernels) -> None:
    packed = PackedLinear.from_linear(nn.Linear(4, 4096), kernels)
    result = packed(torch.randn(2048, 4))
    flags = _flags_of_mapping(result.data_ptr() + result.nbytes // 2)
    assert "hg" in flags  # VM_HUGEPAGE, in proc(5)


def _flags_of_mapping(address: int) -> list[str]:
    """What the system notes of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            return words
    raise AssertionError("not mapped")


@needs_compiler
def test_packed_linear_takes_any_leading_shape_and_more_rows_than_one_pass(
    kernels: CpuKernels,
) -> None:
    linear = nn.Linear(40, 24)
    packed = PackedLinear.from_linear(linear, kernels)
    for shape in ((40,), (2, 450, 40), (0, 40), (3, 1, 2, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
    transposed = torch.randn(40, 7).T
    torch.testing.assert_close(packed(transposed), linear(transposed), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@settings(relaxed, max_examples=20)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    spread=st.sampled_from([1e-6, 1.0, 1e3]),
    **linear_cases,
)
def test_weights_of_16_bits_give_the_results_of_fp32(
    target: str,
    dtype: torch.dtype,
    spread: float,
    rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kernels = kernels_for(target)
    linear = nn.Linear(in_features, out_features, bias=has_bias)
    linear.weight.data = (linear.weight.data * spread).to(dtype).float()
    linear.weight.data[0, 0] = 1 + 2**-7 if dtype == torch.bfloat16 else 1 + 2**-10
    packed = PackedLinear.from_linear(linear, kernels)
    assert packed.packed.dtype == dtype
    bias = None if linear.bias is None else linear.bias.detach()
    x = torch.randn(rows, in_features)
    wide = kernels.linear(x, kernels.pack_weight(linear.weight), bias, out_features)
    assert torch.equal(packed(x), wide)
    row = seed % rows
    assert torch.equal(packed(x[row : row + 1]), wide[row : row + 1])


@needs_compiler
def test_weights_that_16_bits_do_not_hold_stay_fp32(kernels: CpuKernels) -> None:
    linear = nn.Linear(40, 200)
    linear.weight.data = linear.weight.data.bfloat16().float()
    linear.weight.data[199, 39] = 1 + 2**-12
    assert PackedLinear.from_linear(linear, kernels).packed.dtype == torch.float32
    linear.weight.data[199, 39] = 1e30  # of bfloat16 nearly, of float16 not at all
    assert PackedLinear.from_linear(linear, kernels).packed.dtype == torch.float32
    linear.weight.data[199, 39] = 2.0**100
    assert PackedLinear.from_linear(linear, kernels).packed.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="can be packed"):
        kernels.pack_weight(linear.weight.double())


class _TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


@needs_compiler
@torch.inference_mode()
def test_pack_model_keeps_results_and_reports_the_copy_of_tied_weights(
    kernels: CpuKernels,
) -> None:
    model = _TiedModel()
    ids = torch.arange(50)
    expected = model(ids)
    report = pack_model(model, kernels)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    assert report.num_layers == 3
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    padded_head = -(-50 // kernels.panel_width) * kernels.panel_width * 32 * 4
    assert report.extra_bytes == padded_head
    assert report.packed_bytes == padded_head + 2 * 32 * 32 * 4
