"""Packed linear layers against torch in double precision."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.cpu import CpuKernels
from engine.kernels.packed_linear import PackedLinear


def check_linear(
    kernels: CpuKernels, rows: int, in_features: int, out_features: int, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=has_bias)
    packed = PackedLinear.from_linear(linear, kernels)
    x = torch.randn(rows, in_features)
    y = packed(x)
    exact = x.double() @ linear.weight.double().T
    if has_bias:
        exact += linear.bias
    torch.testing.assert_close(y, exact.float(), atol=1e-5, rtol=1e-5)
    row = seed % rows
    assert torch.equal(packed(x[row : row + 1]), y[row : row + 1])
    unpacked = packed.packed.transpose(1, 2).flatten(0, 1)[:out_features]  # of panels [K, width]
    assert torch.equal(unpacked, linear.weight)
