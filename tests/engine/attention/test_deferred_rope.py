"""Deferring the rotary embedding to attention: for which models, and that logits do not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CohereConfig

from engine.attention.deferred_rope import defer_rotation, restore_rotation
from engine.attention.paged import AttentionBackend, ReferenceAttention
from engine.kernels import cpu as cpu_kernels
from engine.model.loaded import LoadedModel
from engine.model.passes import fuse_rotation, warm_up
from engine.model.self_check import attach_paged_attention, paged_logits
from tests.engine.model.architectures import ARCHITECTURES, CPU, SMALL, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

FUSED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"]
REFUSED = {
    "of neighbours, not of halves": lambda: CohereConfig(**SMALL),
    "of a part that is put together again afterwards": ARCHITECTURES["phi"],
    "that does not exist": ARCHITECTURES["gpt2"],
}
needs_kernels = pytest.mark.skipif(cpu_kernels.load() is None, reason="needs the CPU kernels")


class RotatingAttention(ReferenceAttention):
    """The reference attention, with the rotation in plain torch."""

    calls = 0

    def rotary_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        self.calls += 1
        half = cos.shape[1] // 2

        def rotate(states: Tensor) -> Tensor:
            first, second, rest = states.tensor_split([half, 2 * half], dim=-1)
            rotated = torch.cat([first, second], -1) * cos[:, None]
            return torch.cat([rotated + torch.cat([-second, first], -1) * sin[:, None], rest], -1)

        self.write_kv(rotate(key), value, key_cache, value_cache, slot_mapping)
        return rotate(query)


def load(name: str) -> LoadedModel:
    return attach_paged_attention(build_model(ARCHITECTURES[name]()), CPU, torch.float32)


def logits(loaded: LoadedModel, backend: AttentionBackend) -> Tensor:
    return paged_logits(loaded, backend)


@pytest.mark.parametrize("name", FUSED)
@needs_kernels
def test_cpu_kernels_rotate_for_models_with_the_usual_rotation(name: str) -> None:
    loaded, kernels = load(name), cpu_kernels.load()
    assert kernels is not None
    expected = logits(loaded, ReferenceAttention())
    assert fuse_rotation(loaded, kernels)
    torch.testing.assert_close(logits(loaded, kernels), expected, atol=1e-4, rtol=1e-4)


@needs_kernels
@given(
    num_tokens=st.integers(1, 5),
    rotary=st.sampled_from([2, 8, 16, 24]),
    seed=st.integers(0, 1000),
)
def test_cpu_kernels_rotate_parts_of_heads_and_skip_padding_rows(
    num_tokens: int, rotary: int, seed: int
) -> None:
    kernels = cpu_kernels.load()
    assert kernels is not None
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (noise(heads, num_tokens, 24).transpose(0, 1) for heads in (6, 2, 2))
    cos, sin = noise(num_tokens, rotary), noise(num_tokens, rotary)
    slots = torch.randperm(12, generator=generator)[:num_tokens]
    slots[num_tokens // 2] = -1
    before = [noise(3, 2, 4, 24).transpose(1, 2) for _ in range(2)]
    expected_caches = [cache.clone() for cache in before]
    kept = slots >= 0
    expected = RotatingAttention().rotary_write_kv(
        query[kept], key[kept], value[kept], cos[kept], sin[kept], *expected_caches, slots[kept]
    )
    caches = [cache.clone() for cache in before]
    actual = kernels.rotary_write_kv(query, key, value, cos, sin, *caches, slots)
    torch.testing.assert_close(actual[kept], expected)
    for cache, reference in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, reference)


@pytest.mark.parametrize("name", FUSED)
def test_rotation_of_usual_models_is_deferred_to_attention(name: str) -> None:
    loaded, backend = load(name), RotatingAttention()
    expected = logits(loaded, ReferenceAttention())
    assert fuse_rotation(loaded, backend)
    backend.calls = 0
    torch.testing.assert_close(logits(loaded, backend), expected, atol=1e-4, rtol=1e-4)
    assert backend.calls == 3 * len(loaded.layers), "in all steps of the check"


@pytest.mark.parametrize("kind", REFUSED)
def test_other_rotations_are_not_deferred(kind: str) -> None:
    loaded = attach_paged_attention(build_model(REFUSED[kind]()), CPU, torch.float32)
    backend = RotatingAttention()
    expected = logits(loaded, ReferenceAttention())
    assert not fuse_rotation(loaded, backend)
    backend.calls = 0
    assert torch.equal(logits(loaded, backend), expected)
    assert backend.calls == 0


def test_rotation_is_applied_before_a_backend_that_cannot_rotate() -> None:
    loaded = load("llama")
    assert not fuse_rotation(loaded, ReferenceAttention())
    expected = logits(loaded, ReferenceAttention())
    assert defer_rotation(loaded.model) == len(loaded.layers)
    assert torch.equal(logits(loaded, ReferenceAttention()), expected), (
        "the rotation is applied before the backend is called"
    )


def test_deferring_changes_one_model_and_can_be_undone() -> None:
    loaded, other = load("llama"), load("llama")
    expected = logits(loaded, ReferenceAttention())
    defer_rotation(loaded.model)
    backend = RotatingAttention()
    assert torch.equal(logits(other, backend), expected)
    restore_rotation(loaded.model)
    assert torch.equal(logits(loaded, backend), expected)
    assert backend.calls == 0


def test_warm_up_runs_a_step_of_each_kind() -> None:
    loaded, backend = load("llama"), RotatingAttention()
    fuse_rotation(loaded, backend)
    backend.calls = 0
    warm_up(loaded, backend, 16, torch.float8_e5m2)
    assert backend.calls == 4 * len(loaded.layers)
