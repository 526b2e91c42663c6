"""What a process keeps in memory is counted once, however it is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.attention.kv_cache import KVCache, LayerShape
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.memory.held import held_by
from tests.engine.native import needs_compiler

HEADS = LayerShape(num_kv_heads=2, key_dim=4, value_dim=4)
LATENT = LayerShape(num_kv_heads=1, key_dim=6, value_dim=4, is_shared=True)


def cache(*layers: LayerShape) -> KVCache:
    return KVCache(dict(enumerate(layers)), 3, 5, torch.float16, torch.device("cpu"))


def test_weights_that_layers_share_count_once_and_buffers_too() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(8, 6))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(10, dtype=torch.float64))
    assert held_by(model, cache()).weights_bytes == 8 * 6 * 4 + 6 * 4 + 10 * 8


@needs_compiler
@pytest.mark.parametrize("kind", [PackedInt8Linear, PackedInt4Linear])
def test_quantised_weights_count(kind: type[PackedInt8Linear] | type[PackedInt4Linear]) -> None:
    layer = kind.from_linear(nn.Linear(64, 48))
    assert held_by(nn.Sequential(layer), cache()).weights_bytes == sum(
        tensor.nbytes for tensor in layer.quantized
    )


def test_a_cache_takes_its_blocks_and_keys_that_are_values_once() -> None:
    held = held_by(nn.Module(), cache(HEADS, LATENT))
    assert held.cache_bytes == 3 * 5 * 2 * (HEADS.num_kv_heads * 8 + 6)
    assert held.weights_bytes == 0
