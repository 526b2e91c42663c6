"""The cache's size and format; attention over it is tested with the backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from engine.attention.kv_cache import (
    KVCache,
    LayerShape,
    bytes_per_block,
    bytes_per_token,
    to_cache_format,
)
from engine.attention.paged import AttentionBackend, ReferenceAttention
from engine.block_form import BlockForm
from engine.build import build_engine
from engine.model.prepare import _choose_backend, _slow_attention
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import ARCHITECTURES, CPU, build_model
from tests.paths import DEMO_MODEL

LAYERS = {
    0: LayerShape(2, 16, 8),
    3: LayerShape(1, 16, 16),
    5: LayerShape(1, 24, 24, is_shared=True),
}


def config_with(kv_cache_dtype: str | None) -> EngineConfig:
    return EngineConfig(
        model_id=str(DEMO_MODEL),
        socket_path=Path(),
        device="cpu",
        max_batch_total_tokens=4096,
        kv_cache_dtype=kv_cache_dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_bytes_per_token_is_the_size_of_the_tensors(dtype: torch.dtype) -> None:
    cache = KVCache(LAYERS, 5, 16, dtype, CPU)
    tensors = {id(states): states for layer in cache.layers.values() for states in layer}
    size = sum(states.nbytes for states in tensors.values())
    assert size == 5 * 16 * bytes_per_token(LAYERS, dtype)


@pytest.mark.parametrize("is_shared", [False, True])
def test_blocks_of_both_kinds_are_in_the_same_memory_and_hold_no_place_twice(
    is_shared: bool,
) -> None:
    """Here two of seven layers see everything: a block has room for six with a window."""
    shape = LayerShape(2, 16, 16 if is_shared else 8, is_shared)
    layers, windowed = dict.fromkeys(range(7), shape), {0, 1, 3, 4, 6}
    form = BlockForm(window=9, block_size=4, ratio=3, window_places=6, whole_places=2)
    cache = KVCache(layers, 5, 4, torch.float32, CPU, form, windowed)
    storages = {
        part.untyped_storage().data_ptr(): part for pair in cache.layers.values() for part in pair
    }
    size = sum(part.untyped_storage().nbytes() for part in storages.values())
    assert size == 5 * bytes_per_block(layers, 4, torch.float32, form)
    for index, (key, value) in cache.layers.items():  # blocks 0, 2 and 4 with many tokens
        numbers = range(1, 5, 2) if index in windowed else range(0, 5, 2)
        places = form.window_places if index in windowed else form.whole_places
        for block in numbers:
            assert not key[block * places].any()
            assert not value[block * places].any()
            key[block * places], value[block * places] = index + 1, index + 1
    for index, (key, value) in cache.layers.items():
        assert key.shape[1:] == (4 if index in windowed else 12, 2, 16)
        assert key.transpose(1, 2).is_contiguous(), "as GPU kernels take it"
        places = form.window_places if index in windowed else form.whole_places
        for block in range(1, 5, 2) if index in windowed else range(0, 5, 2):
            assert (key[block * places] == index + 1).all()
            assert (value[block * places] == index + 1).all()


def test_only_8_bit_formats_saturate() -> None:
    states = torch.tensor([1.0, -1e5, 1e5, float("nan")])
    assert torch.equal(to_cache_format(states, torch.bfloat16)[:3], states.bfloat16()[:3])
    for dtype, bound in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        stored = to_cache_format(states, dtype).float()
        assert stored[:3].tolist() == [1.0, -bound, bound]
        assert stored[3].isnan(), "NaN must stay NaN"


@pytest.mark.parametrize(
    ("cache_dtype", "name"),
    [(torch.float32, "native CPU kernels"), (torch.float8_e4m3fn, "reference attention")],
)
def test_cpu_kernels_are_used_only_with_a_cache_they_can_read(
    cache_dtype: torch.dtype, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)
    backend, actual = _choose_backend(config_with(None), loaded, cache_dtype)
    if name == "native CPU kernels" and isinstance(backend, ReferenceAttention):
        pytest.skip("no native kernels here")
    assert actual == name
    assert ("with kv_cache_dtype=" in caplog.text) == (name == "reference attention")


def test_a_dtype_that_cpu_kernels_do_not_compute_in_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_model(ARCHITECTURES["llama"]()).to(torch.float16)
    loaded = attach_paged_attention(model, CPU, torch.float16)
    asked = replace(config_with(None), dtype="float16")
    assert _choose_backend(asked, loaded, torch.float16)[1] == "reference attention"
    assert "with dtype=float16 torch computes" in caplog.text
    caplog.clear()
    _choose_backend(replace(asked, enable_native_kernels=False), loaded, torch.float16)
    assert not caplog.text


def test_a_gpu_without_its_kernels_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    gpu = torch.device("cuda")
    note = _slow_attention(gpu, ReferenceAttention())
    assert note is not None
    assert "many times slower" in note
    assert note in caplog.text
    assert _slow_attention(gpu, cast("AttentionBackend", object())) is None
    assert _slow_attention(CPU, ReferenceAttention()) is None


def test_a_model_generates_with_an_8_bit_cache() -> None:
    prompt = tuple(range(5, 25))
    texts = []
    for kv_cache_dtype in (None, "fp8_e4m3fn"):
        engine, info = build_engine(config_with(kv_cache_dtype))
        assert info.max_batch_total_tokens == 4096
        request = Request(request_id="r", prompt_token_ids=prompt, max_new_tokens=8)
        texts.append(token_ids(run(engine, request)["r"]))
    assert texts[0][0] == texts[1][0]
    assert len(texts[1]) == 8


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="kv_cache_dtype must be one of fp8_e4m3fn, fp8_e5m2"):
        build_engine(config_with("int4"))
