"""Fused norms and MLPs in whole models: what is replaced, and that tokens do not change."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2MoeConfig

from engine.attention.paged import ReferenceAttention
from engine.build import build_engine
from engine.computation import sized_runner
from engine.kernels import has_triton
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.packed_linear import PackedLinear, pack_model
from engine.model import fusion, prepare
from engine.model.fusion import FusedKernels, FusedMLP, FusedRMSNorm, fuse, kernels_for_fusion
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.passes import fuse_layers
from engine.model.self_check import attach_paged_attention, paged_logits
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import (
    ARCHITECTURES,
    NUM_NEW_TOKENS,
    build_model,
    generate,
    make_prompts,
)
from tests.engine.model.fused_kernels import native_kernels, triton_kernels
from tests.engine.native import kernels_for, threads

CPU = torch.device("cpu")
# Norms per layer; there is one more after the last layer. Every layer has an MLP.
NUM_NORMS = {
    "llama": 2,
    "qwen2": 2,
    "qwen3": 4,
    "mistral": 2,
    "gemma": 2,
    "gemma2": 4,
    "gemma3": 6,
    "phi3": 2,
}
NUM_LAYERS = 3
UNTOUCHED = ("gpt2", "phi")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=[native_kernels, triton_kernels], ids=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> FusedKernels:
    found = request.param()
    assert isinstance(found, FusedKernels)
    return found


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.inference_mode():
        result = model(input_ids=ids, use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def config(path: Path, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_id=str(path), socket_path=path / "socket", device="cpu", num_threads=1, **options
    )


class TestModels:
    """Whole models."""

    @pytest.mark.parametrize("name", NUM_NORMS)
    def test_of_every_architecture_are_fused_and_keep_their_logits(
        self, name: str, kernels: FusedKernels
    ) -> None:
        model = build_model(ARCHITECTURES[name](), scale=1.0)
        expected = logits(model)
        fused = fuse(model, kernels)
        assert fused.num_norms == NUM_LAYERS * NUM_NORMS[name] + 1
        assert fused.num_mlps == NUM_LAYERS
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        fused.undo()
        assert torch.equal(logits(model), expected)
        assert not any(isinstance(layer, FusedRMSNorm | FusedMLP) for layer in model.modules())

    @pytest.mark.parametrize("name", UNTOUCHED)
    def test_with_other_layers_are_not_changed(self, name: str) -> None:
        model = build_model(ARCHITECTURES[name]())
        assert fuse(model, native_kernels()) == fusion.Fusion()

    def test_with_experts_have_their_shared_expert_fused(self) -> None:
        sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
        model = build_model(
            Qwen2MoeConfig(
                **SIZES,
                **sizes,
                vocab_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_experts=4,
                num_experts_per_tok=2,
                decoder_sparse_step=1,
            ),
            scale=1.0,
        )
        expected = logits(model)
        assert fuse(model, native_kernels()).num_mlps == 2
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("name", NUM_NORMS)
    def test_hold_no_copies_of_weights(self, name: str) -> None:
        model = build_model(ARCHITECTURES[name]())
        before = num_bytes(model)
        layers = [
            weakref.ref(layer) for layer in model.modules() if type(layer).__name__.endswith("MLP")
        ]
        assert len(layers) == NUM_LAYERS
        fused = fuse(model, native_kernels())
        held = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        originals = [weight for *_, layer in fused.replaced for weight in layer.parameters()]
        assert {tensor.untyped_storage().data_ptr() for tensor in originals} <= held
        del fused, originals
        gc.collect()
        assert num_bytes(model) == before
        assert not any(layer() for layer in layers)

    @pytest.mark.parametrize("quantize", [None, "int8"])
    @pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
    def test_are_packed_and_quantised_afterwards(
        self, name: str, quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels_for("whole")
        seen: list[LoadedModel] = []

        def make_runner(loaded: LoadedModel, *rest: Any) -> ModelRunner:
            seen.append(loaded)
            return ModelRunner(loaded, *rest)

        monkeypatch.setattr(sized_runner, "ModelRunner", make_runner)
        build_model(ARCHITECTURES[name](), scale=1.0).save_pretrained(tmp_path)
        build_engine(config(tmp_path, quantize=quantize, max_batch_total_tokens=512))
        mlps = [layer for layer in seen[0].model.modules() if isinstance(layer, FusedMLP)]
        assert len(mlps) == NUM_LAYERS
        kind = PackedLinear if quantize is None else PackedInt8Linear
        assert {type(mlp.gate_up_proj) for mlp in mlps} == {kind}

    @pytest.mark.parametrize("name", NUM_NORMS)
    def test_generate_the_tokens_of_transformers(self, name: str, tmp_path: Path) -> None:
        kernels_for("whole")
        build_model(ARCHITECTURES[name]()).save_pretrained(tmp_path)
        engine, _ = build_engine(config(tmp_path, max_batch_total_tokens=512))
        requests = [
            Request(request_id=str(i), prompt_token_ids=prompt, max_new_tokens=NUM_NEW_TOKENS)
            for i, prompt in enumerate(make_prompts())
        ]
        outputs = run(engine, *requests)
        assert [token_ids(outputs[r.request_id]) for r in requests] == generate(name)

    @pytest.mark.parametrize("switch", ["enable_native_kernels", "enable_fusion"])
    def test_are_not_fused_if_that_is_switched_off(
        self, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prepare, "fuse_layers", lambda _: pytest.fail("fused"))
        build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path)
        build_engine(config(tmp_path, max_batch_total_tokens=512, **{switch: False}))

    def test_whose_logits_would_change_get_their_layers_back(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        kernels_for("whole")
        loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)
        expected = logits_of(loaded)
        monkeypatch.setattr(FusedMLP, "forward", lambda self, x: x)
        monkeypatch.setattr(fusion, "error_of_rows", lambda *_: 0.0)
        fuse_layers(loaded)
        assert "stay as they are" in caplog.text
        assert torch.equal(logits_of(loaded), expected)

    def test_are_not_fused_on_a_gpu_without_triton(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
        monkeypatch.setattr(fusion, "has_triton", has_triton.__wrapped__)
        assert kernels_for_fusion(torch.device("cuda"), torch.float16) is None
        assert "Triton is not installed" in caplog.text

    def test_are_refused_if_memory_is_too_short_to_fuse(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels_for("whole")
        loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)

        def no_room(*_: object) -> None:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        monkeypatch.setattr(fusion, "merged_linear", no_room)
        with pytest.raises(ModelLoadError, match="not enough memory to merge layers: tried"):
            fuse_layers(loaded)

    def test_compute_each_row_independently(self) -> None:
        """A row's result is the same alone and with other rows, bit for bit."""
        model = build_model(ARCHITECTURES["qwen3"]())
        fuse(model, native_kernels())
        pack_model(model, kernels_for("whole"))
        norm = model.model.layers[0].input_layernorm
        mlp = model.model.layers[0].mlp
        rows = torch.randn(1, 600, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), threads(2):
            for layer in (norm, mlp):
                together = layer(rows)
                for index in (0, 7, 599):
                    assert torch.equal(together[:, index], layer(rows[:, index : index + 1])[:, 0])


def num_bytes(model: nn.Module) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def logits_of(loaded: LoadedModel) -> Tensor:
    return paged_logits(loaded, ReferenceAttention())
