"""Fused norms and MLPs: which layers are replaced, by what, and that a model says the same."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, Qwen2MoeConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from engine import build
from engine.attention.paged import ReferenceAttention
from engine.build import build_engine
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
from tests.engine.native import kernels_for, threads

CPU = torch.device("cpu")
# Norms per layer; there is one more behind the last. Every layer has an MLP.
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


def native_kernels() -> FusedKernels:
    """What is computed on a CPU."""
    return fusion._native_kernels(kernels_for("whole"))


def triton_kernels() -> FusedKernels:
    """What is computed on a GPU, here in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("these layers are on the CPU")
    kernels = fusion._triton_kernels()
    assert kernels is not None
    return kernels


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
    def test_of_every_family_are_fused_and_keep_their_logits(
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
    def test_with_other_layers_are_left_alone(self, name: str) -> None:
        model = build_model(ARCHITECTURES[name]())
        assert fuse(model, native_kernels()) == fusion.Fusion()

    def test_with_experts_have_their_shared_one_fused(self) -> None:
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
    def test_hold_no_weight_twice(self, name: str) -> None:
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

        monkeypatch.setattr(build, "ModelRunner", make_runner)
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
    def test_stay_as_they_are_where_that_is_wanted(
        self, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prepare, "fuse_layers", lambda _: pytest.fail("fused"))
        build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path)
        build_engine(config(tmp_path, max_batch_total_tokens=512, **{switch: False}))

    def test_that_would_say_something_else_get_their_layers_back(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        kernels_for("whole")
        loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)
        expected = logits_of(loaded)
        monkeypatch.setattr(FusedMLP, "forward", lambda self, x: x)
        monkeypatch.setattr(fusion, "_error", lambda *_: 0.0)
        fuse_layers(loaded)
        assert "stay as they are" in caplog.text
        assert torch.equal(logits_of(loaded), expected)

    def test_stay_as_they_are_on_a_gpu_without_triton(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
        monkeypatch.setattr(fusion, "has_triton", has_triton.__wrapped__)
        assert kernels_for_fusion(torch.device("cuda"), torch.float16) is None
        assert "Triton is not installed" in caplog.text

    def test_for_which_memory_is_short_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels_for("whole")
        loaded = attach_paged_attention(build_model(ARCHITECTURES["llama"]()), CPU, torch.float32)

        def no_room(*_: object) -> None:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

        monkeypatch.setattr(fusion, "_merge", no_room)
        with pytest.raises(ModelLoadError, match="not enough memory to merge layers: tried"):
            fuse_layers(loaded)

    def test_do_not_mix_rows(self) -> None:
        """A row's result is the same bits alone and among others."""
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


class Around(nn.Module):
    """Something that has a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def make_mlp(kind: type[nn.Module] = LlamaMLP, activation: str = "silu", **sizes: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES | {"hidden_act": activation} | sizes)).eval()


class Scaled(LlamaRMSNorm):
    """Not what it looks like."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.01 * super().forward(hidden_states)


class Centred(LlamaRMSNorm):
    """A layer norm by an RMS norm's name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OtherEpsilon(LlamaRMSNorm):
    """Does not use the epsilon it has."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * (hidden_states * scale)


class Gated(LlamaRMSNorm):
    """Takes a second input."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class Swapped(LlamaMLP):
    """Gate and up have changed places."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


class Clamped(LlamaMLP):
    """Has one step more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e-3, 1e-3)


class Wrapped(nn.Linear):
    """Whose weight others may read."""


def listened_to(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_scales(layer: LlamaMLP) -> LlamaMLP:
    layer.up_proj.weight_scale = nn.Parameter(torch.ones(1))
    return layer


def with_another_linear(layer: LlamaMLP) -> LlamaMLP:
    layer.gate_proj = Wrapped(64, 96, bias=False)
    return layer


LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(64),
    "layer norm without bias": lambda: nn.LayerNorm(64, bias=False),
    "group norm": lambda: nn.GroupNorm(4, 64),
    "linear": lambda: nn.Linear(64, 1),
    "scaled": lambda: Scaled(64),
    "centred": lambda: Centred(64),
    "epsilon": lambda: OtherEpsilon(64),
    "gated norm": lambda: Gated(64),
    "hooks": lambda: listened_to(LlamaRMSNorm(64)),
    "swapped": lambda: make_mlp(Swapped),
    "clamped": lambda: make_mlp(Clamped),
    "relu": lambda: make_mlp(activation="relu"),
    "exact gelu": lambda: make_mlp(activation="gelu"),
    "another gelu": lambda: make_mlp(activation="quick_gelu"),
    "more tensors": lambda: with_scales(make_mlp()),
    "another linear": lambda: with_another_linear(make_mlp()),
}


class TestLayers:
    """One layer at a time."""

    @pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
    def test_that_only_look_alike_are_left_alone(self, make: Callable[[], nn.Module]) -> None:
        for kernels, dtype in (
            (native_kernels(), torch.float32),
            (triton_kernels(), torch.bfloat16),
        ):
            layer = make().eval().to(dtype)
            around = Around(layer)
            assert fuse(around, kernels) == fusion.Fusion()
            assert around.layer is layer

    def test_whose_weights_are_shared_are_left_alone(self) -> None:
        first, second = make_mlp(), make_mlp()
        second.up_proj.weight = first.up_proj.weight
        third = make_mlp()
        third.up_proj = first.up_proj
        assert fuse(nn.ModuleList([first, second, third]), native_kernels()).num_mlps == 0

    def test_that_are_used_in_two_places_are_replaced_in_both(self) -> None:
        around = Around(make_mlp(Phi3MLP))
        both = nn.ModuleList([around, Around(around.layer)])
        assert fuse(both, native_kernels()).num_mlps == 1
        assert isinstance(both[0].layer, FusedMLP)
        assert both[0].layer is both[1].layer

    def test_with_biases_are_fused(self) -> None:
        layer = make_mlp(mlp_bias=True)
        for name in ("gate_proj", "up_proj", "down_proj"):
            nn.init.normal_(getattr(layer, name).bias)
        around, x = Around(layer), torch.randn(5, 64)
        expected = layer(x)
        assert fuse(around, native_kernels()).num_mlps == 1
        torch.testing.assert_close(around.layer(x), expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
    @pytest.mark.parametrize("width", [8, 24, 128, 1000])
    def test_norms_on_a_gpu_round_as_transformers_does(
        self, kind: type[nn.Module], width: int
    ) -> None:
        around = Around(kind(width).half())
        nn.init.normal_(around.layer.weight)
        layer = around.layer
        assert fuse(around, triton_kernels()).num_norms == 1
        x = torch.randn(2, 9, 3, width).half()
        for rows in (x, x.transpose(1, 2), x[:, ::2]):
            actual, expected = around.layer(rows), layer(rows)
            assert actual.dtype is expected.dtype
            # Sums have another order, which tips few roundings.
            assert (actual != expected).float().mean() < 0.01
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=2e-3)

    @pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("width", [96, 1500])
    def test_gates_on_a_gpu_round_as_transformers_does(
        self, width: int, dtype: torch.dtype, activation: str
    ) -> None:
        around = Around(make_mlp(activation=activation, intermediate_size=width).to(dtype))
        layer, x = around.layer, torch.randn(2, 3, 64).to(dtype)
        assert fuse(around, triton_kernels()).num_mlps == 1
        tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
        with torch.inference_mode():
            error = fusion._error(around.layer(x), layer(x))
        assert error < tolerance
