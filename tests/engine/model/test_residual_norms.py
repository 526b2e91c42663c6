"""Additions merged with the norms after them: which layers are, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from engine.model.fusion import FusedRMSNorm, fuse
from engine.model.passes import merge_residuals as merge_if_logits_stay
from engine.model.residual_norms import merge_residuals
from engine.model.self_check import attach_paged_attention, reference_logits
from tests.engine.model.architectures import ARCHITECTURES, CPU, build_model
from tests.engine.model.fused_kernels import native_kernels, triton_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread"),
]

NUM_LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MERGED: dict[str, Callable[[], PreTrainedConfig]] = {
    **{name: ARCHITECTURES[name] for name in ("llama", "qwen3", "mistral", "phi3")},
    **{name: ARCHITECTURES[name] for name in ("gemma2", "gemma3")},
    "qwen3 moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
    "gpt-oss": lambda: GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    ),
}
APART: dict[str, Callable[[], PreTrainedConfig]] = {
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.5),
    "gpt2": ARCHITECTURES["gpt2"],  # another kind of norm
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result = model(input_ids=torch.arange(3, 23).unsqueeze(0), use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def count_additions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each merged addition."""
    added: list[object] = []
    add = FusedRMSNorm.add

    def counted(norm: FusedRMSNorm, x: Tensor, update: Tensor) -> Tensor:
        added.append(norm)
        return add(norm, x, update)

    monkeypatch.setattr(FusedRMSNorm, "add", counted)
    return added


@pytest.mark.parametrize("name", MERGED)
def test_logits_stay_the_same_and_can_be_restored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(MERGED[name](), scale=1.0)
    fuse(model, triton_kernels())
    expected = logits(model)
    merged = merge_residuals(model)
    assert len(merged.layers) == NUM_LAYERS
    additions = count_additions(monkeypatch)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert len(additions) == 2 * NUM_LAYERS
    kept = [norm for norm in model.modules() if getattr(norm, "_ahead", None) is not None]
    assert not kept
    merged.undo()
    additions.clear()
    assert torch.equal(logits(model), expected)
    assert not additions


@pytest.mark.parametrize("name", APART)
def test_layers_that_compute_something_else_stay(name: str) -> None:
    model = build_model(APART[name](), scale=1.0)
    fuse(model, triton_kernels())
    assert not merge_residuals(model).layers


def test_layers_stay_where_no_kernel_adds() -> None:
    model = build_model(ARCHITECTURES["llama"]())
    fuse(model, native_kernels())
    assert not merge_residuals(model).layers


def test_a_layer_whose_arguments_would_get_lost_stays() -> None:
    model = build_model(ARCHITECTURES["llama"]())
    fuse(model, triton_kernels())
    first = model.model.layers[0]
    plain = first.forward

    def forward(hidden_states: Tensor, **arguments: Any) -> object:
        return plain(hidden_states, **arguments | {"of_a_step": None})

    first.forward = forward
    assert len(merge_residuals(model).layers) == NUM_LAYERS - 1


def test_a_norm_of_another_tensor_is_computed() -> None:
    model = build_model(LlamaConfig(**SIZES), scale=1.0)
    fuse(model, triton_kernels())
    norm = model.model.norm
    x, update = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    total = norm.add(x, update)
    assert torch.equal(total, x + update)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (64,), norm.weight, norm.epsilon))
    assert torch.equal(norm.add(x, update), total)
    wanted = nn.functional.rms_norm(total, (64,), norm.weight, norm.epsilon)
    torch.testing.assert_close(norm(total.clone()), wanted)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_it_is_undone_if_the_models_logits_change(
    is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = attach_paged_attention(build_model(LlamaConfig(**SIZES)), CPU, torch.float32)
    fuse(loaded.model, triton_kernels())
    expected = reference_logits(loaded)
    additions = count_additions(monkeypatch)
    if is_wrong:
        norm = type(loaded.model.model.norm)
        plain = norm.forward
        monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) * (1 + len(additions)))
    merge_if_logits_stay(loaded)
    monkeypatch.undo()
    assert ("forward" in vars(loaded.model.model.layers[0])) is not is_wrong
    loaded.known.forget()
    torch.testing.assert_close(reference_logits(loaded), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [8, 24, 1000])
def test_a_sum_and_its_norm_round_as_torchs(width: int, dtype: torch.dtype) -> None:
    triton_kernels()
    from engine.kernels.triton_elementwise import add_rms_norm, rms_norm

    x, update = (torch.randn(2, 9, width).to(dtype) for _ in range(2))
    weight = torch.randn(width).to(dtype)
    for x_like, update_like in ((x, update), (x.transpose(0, 1), update.transpose(0, 1))):
        kind = {"weight_offset": 1.0, "rounds_early": False}
        total, normed = add_rms_norm(x_like, update_like, weight, 1e-6, **kind)
        assert torch.equal(total, x_like + update_like)
        assert torch.equal(normed, rms_norm(x_like + update_like, weight, 1e-6, **kind))


def test_rows_that_differ_in_kind_are_refused() -> None:
    triton_kernels()
    from engine.kernels.triton_elementwise import add_rms_norm

    x, kind = torch.ones(2, 8), {"weight_offset": 0.0, "rounds_early": True}
    for update in (torch.ones(1, 8), torch.ones(2, 8).half()):
        with pytest.raises(ValueError, match="differ"):
            add_rms_norm(x, update, x[0], 1e-6, **kind)
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(x, x, torch.ones(4), 1e-6, **kind)
