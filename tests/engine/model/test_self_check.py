"""The checks of a model and its backend before it serves, and their tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from engine.attention.paged import ReferenceAttention
from engine.model.loaded import LoadedModel
from engine.model.loading import load_model
from engine.model.self_check import attach_paged_attention, backend_agrees
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import ARCHITECTURES, CPU, SMALL, build_model
from tests.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

HALF_FORMATS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF_FORMATS)
def test_the_bundled_model_is_served_in_half_formats(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config = EngineConfig(
        model_id=str(DEMO_MODEL),
        socket_path=DEMO_MODEL / "unused.sock",
        device="cpu",
        dtype=name,
        enable_native_kernels=False,  # they round to bfloat16 within linear layers only
    )
    assert load_model(config).dtype is dtype


@pytest.mark.parametrize("dtype", HALF_FORMATS)
def test_roundings_of_many_layers_are_tolerated(dtype: torch.dtype) -> None:
    """The largest error of a logit is a tenth of their spread in bfloat16, more in wide models."""
    deep = LlamaConfig(**{**SMALL, "num_hidden_layers": 32, "initializer_range": 0.125})
    attach_paged_attention(build_model(deep, scale=1.0).to(dtype), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_FORMATS])
def test_a_model_that_computes_something_else_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: ReferenceAttention, query: Tensor, *rest: Any, **options: Any) -> Tensor:
        return torch.zeros_like(query)

    monkeypatch.setattr(ReferenceAttention, "paged_attention", forgetful)
    with pytest.raises(ModelLoadError, match="its logits on paged attention differ by"):
        attach_paged_attention(build_model(ARCHITECTURES["llama"]()).to(dtype), CPU, dtype)


class FailingAttention(ReferenceAttention):
    """Gives wrong results in steps of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def paged_attention(self, query: Tensor, *rest: Any, **options: Any) -> Tensor:
        block_tables, context_lens = rest[2], rest[4]
        found = {
            "decode steps": len(query) == 1,
            "steps of prompts": len(query) > 1,
            "long texts": int(context_lens.max()) > 256,
            "wide tables": block_tables.shape[1] * 4 > 256,
            "no steps": False,
        }
        result = super().paged_attention(query, *rest, **options)
        return result.neg() if found[self.kind] else result


@pytest.fixture
def llama() -> LoadedModel:
    return attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_a_backend_is_used_if_it_agrees(llama: LoadedModel, dtype: torch.dtype) -> None:
    assert backend_agrees(llama, FailingAttention("no steps"), 4, dtype)


@pytest.mark.parametrize("kind", ["decode steps", "steps of prompts", "long texts", "wide tables"])
def test_a_backend_is_checked_with_every_kind_of_step(
    llama: LoadedModel, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not backend_agrees(llama, FailingAttention(kind), 4, torch.float32)
    assert "FailingAttention is not used: its logits differ by" in caplog.text


def test_a_backend_that_does_not_run_is_not_used(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FailingAttention("no steps")

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backend, "paged_attention", broken)
    assert not backend_agrees(llama, backend, 4, torch.float32)
    assert "it does not run here: no such instruction" in caplog.text
