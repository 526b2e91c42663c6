"""Rounding before and scaling after 8-bit products on a GPU, compared with torch on the CPU.

It runs on a GPU where there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.kernels import has_triton
from engine.model import quantized_linear
from engine.model.quantized_linear import Fp8Linear, Int8Linear, QuantizedLinear
from tests.engine.on_device import DEVICE, INTERPRETED

triton = pytest.importorskip("triton")

INPUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
IN_TORCH = quantized_linear._row_ops("cpu")
IN_TRITON = quantized_linear._row_ops("cuda")
widths = st.one_of(st.integers(1, 5000), st.sampled_from([8191, 8192, 8193, 20_000]))
input_dtypes = st.sampled_from(INPUT_DTYPES)


@pytest.fixture(autouse=True, scope="module")
def rounding_of_gpus() -> Iterator[None]:
    """The interpreter truncates where a GPU rounds: here torch converts to bf16 and fp8 instead."""
    if not INTERPRETED:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = triton.language
    inexact = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source != tl.float32 or target not in inexact:
            return np.asarray(convert(data, source, target, rounding))
        numbers = torch.from_numpy(np.ascontiguousarray(data)).to(inexact[target])
        bits = getattr(torch, f"uint{target.primitive_bitwidth}")
        return np.asarray(numbers.view(bits).numpy())

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", rounded)
        yield


def rounded_rows(ops: quantized_linear._RowOps, dtype: torch.dtype, x: Tensor) -> list[Tensor]:
    x = x.to(DEVICE) if ops is IN_TRITON else x
    values, scales = ops.to_int8(x, 0) if dtype is torch.int8 else ops.to_float8(x)
    assert values.dtype is dtype
    assert scales.dtype is torch.float32
    return [values.float().cpu(), scales.cpu()]


def check(dtype: torch.dtype, x: Tensor) -> None:
    ours, wanted = (rounded_rows(ops, dtype, x) for ops in (IN_TRITON, IN_TORCH))
    torch.testing.assert_close(ours[1], wanted[1], rtol=0, atol=0, equal_nan=True)
    if dtype is torch.int8:  # has no NaN: levels are ignored if the scale is not finite
        is_finite = wanted[1].isfinite().squeeze(1)
        ours, wanted = [ours[0][is_finite]], [wanted[0][is_finite]]
    torch.testing.assert_close(ours[0], wanted[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@settings(max_examples=80)
@given(
    rows=st.integers(1, 4),
    width=widths,
    input_dtype=input_dtypes,
    exponent=st.integers(-45, 38),
    special=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 19_999),
            st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-39]),
        ),
        max_size=4,
    ),
    seed=st.integers(0, 2**16),
)
@example(rows=2, width=20_000, input_dtype=torch.bfloat16, exponent=0, special=[], seed=0)
def test_rows_are_rounded_as_torch_rounds_them(
    dtype: torch.dtype,
    rows: int,
    width: int,
    input_dtype: torch.dtype,
    exponent: int,
    special: list[tuple[int, int, float]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=generator).double() * 10.0**exponent).to(input_dtype)
    for row, column, value in special:
        if row < rows:
            x[row, column % width] = value
    check(dtype, x)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("input_dtype", INPUT_DTYPES)
def test_rows_of_every_kind_are_rounded_as_torch_rounds_them(
    dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    usual = torch.randn(300)
    rows = [usual * 0, -usual * 0, usual * 1e-38, usual * 1e-29, usual * 1e30, usual]
    for value in (math.nan, math.inf, -math.inf):
        rows.append(usual.index_fill(0, torch.tensor([299]), value))
        rows.append(torch.full_like(usual, value))
    rows.append(rows[6].index_fill(0, torch.tensor([0]), math.inf))
    check(dtype, torch.stack(rows).to(input_dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("input_dtype", INPUT_DTYPES)
def test_ties_are_rounded_to_even(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    """Quotients halfway between two numbers: the largest magnitude makes the scale 1."""
    largest = 127 if dtype is torch.int8 else 448
    x = (
        torch.cat([torch.arange(-63.5, 64, 0.5), torch.tensor([largest])])
        .to(input_dtype)
        .unsqueeze(0)
    )
    values, scales = rounded_rows(IN_TRITON, dtype, x)
    assert scales.item() == 1
    check(dtype, x)
    if dtype is torch.int8:
        assert torch.equal(values, x.float().round())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_bounds_of_tiny_scales_are_those_of_torch(dtype: torch.dtype) -> None:
    bounds = torch.tensor([1e-30, 1.27e-28])
    for direction in (0.0, math.inf):
        near = [bounds]
        for _ in range(50):
            near.append(near[-1].nextafter(torch.tensor(direction)))
        x = torch.stack(near).reshape(-1, 1)
        check(dtype, torch.cat([x, x / 3], dim=1))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@given(width=widths, input_dtype=input_dtypes, seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_a_row_does_not_depend_on_the_others(
    dtype: torch.dtype, width: int, input_dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, width, generator=generator).to(input_dtype)
    together = rounded_rows(IN_TRITON, dtype, x)
    x[1] = math.nan
    for row in (0, 2, 4):
        for other in (x, x[row:], x[row : row + 1]):
            index = row if other is x else 0
            alone = rounded_rows(IN_TRITON, dtype, other)
            assert all(torch.equal(a[index], b[row]) for a, b in zip(alone, together, strict=True))


def test_rows_added_for_the_product_come_last() -> None:
    x = torch.randn(3, 40, device=DEVICE)
    for min_rows in (0, 3, 32):
        levels, scales = IN_TRITON.to_int8(x, min_rows)
        assert levels.shape == (max(3, min_rows), 40)
        assert scales.shape == (3, 1)
        assert torch.equal(levels[:3].cpu(), IN_TORCH.to_int8(x.cpu(), 0)[0])


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    surplus=st.integers(0, 20),
    width=st.one_of(st.integers(1, 300), st.sampled_from([1023, 1024, 1025, 5000])),
    input_dtype=input_dtypes,
    has_bias=st.booleans(),
    exponent=st.integers(-40, 30),
    seed=st.integers(0, 2**16),
)
def test_sums_are_scaled_as_torch_scales_them(
    rows: int,
    surplus: int,
    width: int,
    input_dtype: torch.dtype,
    *,
    has_bias: bool,
    exponent: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bound = 2 ** (seed % 32)
    shape = (rows + surplus, width)
    sums = torch.randint(-bound, bound, shape, generator=generator).clamp(max=2**31 - 1).int()
    scales = torch.rand(rows, 1, generator=generator) * 10.0**exponent
    scales[seed % rows] = [1.0, math.nan, math.inf, 1e-30][seed % 4]
    columns = torch.rand(1, width, generator=generator)
    bias = torch.randn(width, generator=generator).to(input_dtype) if has_bias else None
    wanted = IN_TORCH.scale(sums, scales, columns, bias, input_dtype)
    there = (sums.to(DEVICE), scales.to(DEVICE), columns.to(DEVICE))
    ours = IN_TRITON.scale(*there, None if bias is None else bias.to(DEVICE), input_dtype)
    assert ours.dtype is input_dtype
    torch.testing.assert_close(ours.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="products in float8 differ between CPU and GPU")
@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("input_dtype", INPUT_DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layers_equal_those_in_torch(
    kind: type[QuantizedLinear],
    input_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_bias: bool,
) -> None:
    linear = nn.Linear(272, 96, bias=has_bias, dtype=input_dtype)
    inputs = [
        torch.randn(shape).to(input_dtype) for shape in ((272,), (2, 3, 272), (40, 272), (0, 272))
    ]
    inputs[2][7, 5] = math.inf
    in_torch = kind.from_linear(linear)
    expected = [in_torch(x) for x in inputs]
    monkeypatch.setattr(quantized_linear, "_row_ops", lambda _: IN_TRITON)
    in_triton = kind.from_linear(linear)
    for (name, ours), wanted in zip(in_triton.named_buffers(), in_torch.buffers(), strict=True):
        assert torch.equal(ours.float(), wanted.float()), name
    for x, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(in_triton(x), wanted, rtol=0, atol=0, equal_nan=True)
    assert not expected[2][7].isfinite().any()
    assert expected[2][8].isfinite().all()


def test_a_gpu_without_triton_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.setattr(quantized_linear, "has_triton", has_triton.__wrapped__)
    assert quantized_linear._row_ops.__wrapped__("cuda") == IN_TORCH
