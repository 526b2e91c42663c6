"""What the layers with quantised weights have in common, for all instruction sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.kernels.bfloat16 import PackedBfloat16Linear
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.quantized_linear import QuantizedLinear
from tests.engine.native import TARGETS, kernels_for, threads

LAYERS: tuple[type[QuantizedLinear[Any]], ...] = (
    PackedInt8Linear,
    PackedInt4Linear,
    PackedBfloat16Linear,
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_do_not_depend_on_threads_or_other_rows(
    kind: type[QuantizedLinear[Any]], target: str
) -> None:
    layer = kind.from_linear(nn.Linear(1536, 300), kernels_for(target))
    x = torch.randn(250, 1536)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for rows in (slice(7, 8), slice(3, 12), slice(100, 132)):
        assert torch.equal(layer(x[rows]), results[0][rows])
