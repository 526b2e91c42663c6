"""The kernels on AArch64: compiled without a warning, and called in an emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import nn

from engine.kernels.cpu import CpuKernels
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from tests.engine.kernels.emulated import emulated_library
from tests.engine.kernels.linear_checks import check_linear
from tests.engine.kernels.test_cpu import Case, check_attention
from tests.engine.kernels.test_grouped_int8 import check_product, stored
from tests.engine.kernels.test_int4 import product as int4_product
from tests.engine.kernels.test_int8 import product as int8_product


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuKernels]:
    """The kernels for every processor of that kind."""
    with emulated_library(tmp_path_factory.mktemp("aarch64"), "-march=armv8-a") as library:
        yield CpuKernels(cast("ctypes.CDLL", library))


def test_vectors_are_those_of_neon(neon: CpuKernels) -> None:
    assert (neon.vector_width, neon.has_float16, neon.has_openmp) == (4, True, True)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 70, 33), (13, 600, 45), (30, 129, 8)])
def test_linear_layers_equal_torch(neon: CpuKernels, rows: int, inputs: int, outputs: int) -> None:
    check_linear(neon, rows, inputs, outputs, has_bias=rows > 1, seed=rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_give_the_results_of_fp32(neon: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, x, bias = torch.randn(40, 300).to(dtype), torch.randn(5, 300), torch.randn(40)
    packed = neon.pack_weight(weight)
    assert packed.dtype == dtype
    expected = neon.linear(x, neon.pack_weight(weight.float()), bias, 40)
    assert torch.equal(neon.linear(x, packed, bias, 40), expected)


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_int8_layers_have_the_bits_of_other_processors(neon: CpuKernels, rows: int) -> None:
    torch.manual_seed(rows)
    linear, x = nn.Linear(1100, 50, bias=False), torch.randn(rows, 1100)
    layer = PackedInt8Linear.from_linear(linear, neon)
    assert torch.equal(layer(x), int8_product(x, linear.weight.detach()))


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_int8_layers_with_groups_are_those_of_the_files_numbers(
    neon: CpuKernels, rows: int
) -> None:
    torch.manual_seed(rows)
    check_product(neon, stored(nn.Linear(1088, 50)), rows)


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_int4_layers_are_those_of_the_rounded_numbers(neon: CpuKernels, rows: int) -> None:
    torch.manual_seed(rows)
    linear, x = nn.Linear(1088, 50), torch.randn(rows, 1088)
    layer = PackedInt4Linear.from_linear(linear, neon)
    torch.testing.assert_close(layer(x).double(), int4_product(x, linear), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("sliding_window", [None, 40])
def test_attention_equals_the_reference(
    neon: CpuKernels, head_size: int, sliding_window: int | None
) -> None:
    case = Case(
        sequences=[(1, 90), (30, 130), (1, 700)],
        heads=(4, 2),
        head_size=head_size,
        block_size=16,
        sliding_window=sliding_window,
        chunk_size=None,
        softcap=None,
        has_sinks=sliding_window is not None,
        bias_scale=None if sliding_window is None else 0.3,
        head_major=True,
        seed=3,
    )
    check_attention(neon, case)


def test_norms_and_gates_equal_torch(neon: CpuKernels) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(3, 45), torch.randn(45)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(neon.rms_norm(x, weight, 1e-6), exact.float(), atol=1e-5, rtol=1e-5)
    gate, up = (torch.randn(3, 90) * 40).chunk(2, dim=-1)
    expected = (nn.functional.silu(gate.double()) * up.double()).float()
    torch.testing.assert_close(neon.silu_and_mul(gate, up), expected, atol=1e-5, rtol=1e-5)


def test_the_likeliest_tokens_are_chosen(neon: CpuKernels) -> None:
    torch.manual_seed(7)
    scores = torch.randn(3, 1000)
    tokens, logprobs, *_ = neon.choose(scores, None)
    assert torch.equal(tokens, scores.argmax(-1))
    expected = scores.log_softmax(-1).max(-1).values
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
