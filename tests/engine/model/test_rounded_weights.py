"""Models whose weights are asked for in 16 bits, on a CPU: rounded, and computed in float32."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from engine.attention.paged import ReferenceAttention
from engine.kernels.packed_linear import PackedLinear
from engine.model import loading, quantization, weight_size
from engine.model.loading import load_model
from engine.model.prepare import prepare
from engine.model.self_check import paged_logits
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import ARCHITECTURES, build_model
from tests.engine.model.quantized import compress, config
from tests.engine.native import kernels_for

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = ["bfloat16", "float16"]


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a processor that does not multiply bfloat16."""
    kernels = kernels_for("whole")
    monkeypatch.setattr(kernels, "multiplies_pairs", False)
    monkeypatch.setattr(quantization.cpu_kernels, "load", lambda: kernels)


def save(path: Path, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Path:
    """Saves a random model in float32, its weights rounded to a dtype."""
    build_model(ARCHITECTURES["llama"](), scale).to(dtype).float().save_pretrained(path)
    return path


def logits(path: Path, dtype: str | None) -> torch.Tensor:
    return paged_logits(load_model(config(path, None, dtype=dtype)), ReferenceAttention())


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_a_checkpoint_that_was_saved_so(tmp_path: Path, dtype: str) -> None:
    exact = save(tmp_path / "exact")
    rounded = save(tmp_path / "rounded", getattr(torch, dtype))
    assert torch.equal(logits(exact, dtype), logits(rounded, None))
    assert not torch.equal(logits(exact, dtype), logits(exact, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers_keep_their_weights_in_16_bits(tmp_path: Path, dtype: str) -> None:
    prepared = prepare(config(save(tmp_path), None, dtype=dtype, max_total_tokens=64))
    assert prepared.attention == "native CPU kernels"
    assert prepared.cache_dtype is torch.float32
    layers = [layer for layer in prepared.loaded.model.modules() if isinstance(layer, PackedLinear)]
    assert layers
    assert {layer.packed.dtype for layer in layers} == {getattr(torch, dtype)}


def test_a_quantised_model_starts_from_the_rounded_weights(tmp_path: Path) -> None:
    exact, rounded = save(tmp_path / "exact"), save(tmp_path / "rounded", torch.bfloat16)
    found, expected = (
        prepare(config(path, "int8", dtype=dtype, max_total_tokens=64))
        for path, dtype in ((exact, "bfloat16"), (rounded, None))
    )
    pair = (paged_logits(model.loaded, ReferenceAttention()) for model in (found, expected))
    assert torch.equal(*pair)


@pytest.mark.parametrize("value", [7e4, -1e9])
def test_a_weight_that_the_dtype_cannot_hold_refuses_the_model(
    tmp_path: Path, value: float
) -> None:
    model = build_model(ARCHITECTURES["llama"]())
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[1, 2] = value
    model.save_pretrained(tmp_path)
    message = "model.layers.1.mlp.up_proj.weight has values that dtype=float16 cannot hold"
    with pytest.raises(ModelLoadError, match=message):
        load_model(config(tmp_path, None, dtype="float16"))
    load_model(config(tmp_path, None, dtype="bfloat16"))


def test_torch_computes_in_16_bits_where_float32_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(save(tmp_path), None, dtype="bfloat16", max_total_tokens=64)
    room = loading.weight_bytes(asked, torch.float32) - 1
    monkeypatch.setattr(loading, "free_memory", lambda _: room)
    with caplog.at_level(logging.WARNING):
        assert prepare(asked).loaded.dtype is torch.bfloat16
    assert "for which these weights are too large" in caplog.text


def test_so_it_does_where_weights_only_fit_until_they_are_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(save(tmp_path))
    asked = config(tmp_path, None, dtype="bfloat16")
    room = loading.weight_bytes(asked, torch.float32, 8) - 1
    assert loading.weight_bytes(asked, torch.float32) < room
    for module in (loading, weight_size):
        monkeypatch.setattr(module, "free_memory", lambda _: room)
    assert load_model(asked).dtype is torch.bfloat16


def test_torch_computes_in_16_bits_where_there_are_no_kernels(tmp_path: Path) -> None:
    asked = config(save(tmp_path), None, dtype="float16", enable_native_kernels=False)
    assert load_model(asked).dtype is torch.float16
