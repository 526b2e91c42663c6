"""Writing keys and values on GPUs: slots, layouts, 8-bit caches and the rotation before the write.

It runs on a GPU where there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.paged import AttentionBackend, ReferenceAttention
from tests.engine.on_device import DEVICE

triton = pytest.importorskip("triton")

from engine.kernels.triton_attention import TritonAttention  # noqa: E402  (needs Triton)

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_fills_its_slots_and_skips_padding(block_size: int, dtype: torch.dtype) -> None:
    written = []
    slots = torch.tensor([3, 2 * block_size + 1, 0, block_size - 1])
    states = torch.randn(3, 4, 24).to(dtype).transpose(0, 1)  # [4, 3, 24]
    for backend in (TritonAttention(), ReferenceAttention()):
        caches = KVCache({0: LayerShape(3, 24, 16)}, 3, block_size, dtype, DEVICE).layers[0]
        key, value, where = states.to(DEVICE), states[..., :16].to(DEVICE), slots.to(DEVICE)
        if isinstance(backend, TritonAttention):
            key, value = (torch.cat([x, torch.full_like(x[:1], 9.0)]) for x in (key, value))
            where = torch.cat([where, torch.tensor([-1], device=DEVICE)])
        backend.write_kv(key, value, *caches, where)
        written.append(caches)
    for actual, expected in zip(*written, strict=True):
        assert torch.equal(actual, expected)


def test_heads_whose_elements_are_not_contiguous_are_refused() -> None:
    caches = KVCache({0: LayerShape(2, 16, 16)}, 2, 16, torch.float32, DEVICE).layers[0]
    states = torch.zeros(1, 2, 32, device=DEVICE)[..., ::2]
    with pytest.raises(ValueError, match="side by side"):
        TritonAttention().write_kv(states, states, *caches, torch.zeros(1, dtype=torch.int64))


def test_a_cache_of_another_layout_is_refused() -> None:
    cache = torch.zeros(
        2, 16, 2, 16, device=DEVICE
    )  # token-major: the heads of a slot are contiguous
    states = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="in the order of block, head, slot, element"):
        TritonAttention().write_kv(states, states, cache, cache, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("backend", [ReferenceAttention(), TritonAttention()])
def test_eight_bit_caches_saturate(backend: AttentionBackend, cache_dtype: torch.dtype) -> None:
    bound = torch.finfo(cache_dtype).max
    # Exact in both formats, because the interpreter truncates where a GPU rounds.
    values = [0.0, 1.0, -1.5, 0.25, bound, 1.5 * bound, -2 * bound, float("inf")]
    states = torch.tensor(values, device=DEVICE).view(1, 1, 8)
    caches = KVCache({0: LayerShape(1, 8, 8)}, 1, 16, cache_dtype, DEVICE).layers[0]
    backend.write_kv(states, states, *caches, torch.tensor([2], device=DEVICE))
    for cache in caches:
        stored = cache[0, 2, 0].float()
        assert torch.equal(stored, states.flatten().clamp(-bound, bound))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (40, 40), (24, 16)])
def test_rotating_while_writing_equals_rotating_before(
    head_dim: int, rotary_dim: int, cache_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    def rotate(states: Tensor) -> Tensor:
        first, second = states[..., :rotary_dim].chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        rotated = states[..., :rotary_dim] * cos[:, None] + turned * sin[:, None]
        return torch.cat([rotated, states[..., rotary_dim:]], dim=-1)

    cos, sin = noise(3, rotary_dim), noise(3, rotary_dim)
    query, key, value = noise(5, 3, head_dim).transpose(0, 1), noise(3, 2, head_dim), noise(3, 2, 8)
    slots = torch.tensor([17, -1, 4], device=DEVICE)
    shape = LayerShape(2, head_dim, 8)
    caches, expected = (KVCache({0: shape}, 2, 16, cache_dtype, DEVICE).layers[0] for _ in range(2))
    backend = TritonAttention()
    rotated = backend.rotary_write_kv(query, key, value, cos, sin, *caches, slots)
    backend.write_kv(rotate(key), value, *expected, slots)
    torch.testing.assert_close(rotated, rotate(query), atol=1e-6, rtol=1e-5)
    # The last bit may be rounded differently, and 8-bit formats have 2 or 3 fraction bits.
    tolerance = 1e-5 if cache_dtype is torch.float32 else 0.25
    for actual, wanted in zip(caches, expected, strict=True):
        torch.testing.assert_close(
            actual.float(), wanted.float(), atol=tolerance * 1e-3, rtol=tolerance
        )
