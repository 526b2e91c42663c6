"""Quantisation: the meaning of names, refusals, and quantised models."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from engine.build import build_engine
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.model import loading, quantization
from engine.model.loaded import LoadedModel
from engine.model.loading import load_model
from engine.model.passes import quantize_model
from engine.model.quantization import Scheme
from engine.model.quantized_linear import Int4Linear, Int8Linear
from engine.model.self_check import attach_paged_attention
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from service.launch.settings import Quantization
from service.launch.sources import load as load_settings
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import ARCHITECTURES, SMALL, build_model
from tests.engine.model.quantized import compress, config, relative_error
from tests.engine.native import kernels_for, threads
from tests.engine.recurrent.stateful import STATEFUL

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Checkpoint:
    """The part of a transformers configuration that `choose` reads."""

    def __init__(self, quantization_config: dict[str, Any] | None = None) -> None:
        if quantization_config is not None:
            self.quantization_config = quantization_config


def choose(
    quantize: str | None,
    described: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Scheme | None:
    return quantization.choose(
        config(Path(), quantize, **options), Checkpoint(described), CPU, dtype
    )


class TestChoice:
    """The choice of a scheme by name."""

    def test_without_a_name_is_none(self) -> None:
        assert choose(None) is None

    @pytest.mark.parametrize("name", ["int8", "int4"])
    def test_of_our_own_names_is_the_scheme_of_that_name(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            scheme = choose(name)
        assert scheme is not None
        assert scheme.name == name
        assert not caplog.text

    @pytest.mark.parametrize(
        ("name", "ours"),
        [
            ("eetq", "int8"),
            ("bitsandbytes", "int8"),
            ("bitsandbytes-nf4", "int4"),
            ("bitsandbytes-fp4", "int4"),
        ],
    )
    def test_of_tgis_names_is_an_equivalent_scheme_with_a_warning(
        self, name: str, ours: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            scheme = choose(name)
        assert scheme is not None
        assert scheme.name == ours
        assert f"--quantize {name}: served with {ours}" in caplog.text

    @pytest.mark.parametrize("name", ["gptq", "awq", "marlin", "exl2", "compressed-tensors"])
    def test_of_a_checkpoint_format_is_refused_for_other_checkpoints(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"quantize={name} is for checkpoints that were"):
            choose(name)

    @pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True)])
    def test_of_fp8_needs_a_gpu_with_fp8(
        self, capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match="fp8 needs a GPU"):
            choose("fp8")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        options = (config(Path(), "fp8"), Checkpoint(), torch.device("cuda"), torch.bfloat16)
        if runs:
            scheme = quantization.choose(*options)
            assert scheme is not None
            assert scheme.name == "fp8"
        else:
            with pytest.raises(ValueError, match="fp8 needs a GPU"):
                quantization.choose(*options)

    @pytest.mark.parametrize(
        ("device", "kind", "wanted"),
        [
            ("cpu", "float", "dequantize"),
            ("cuda", "float", "use_optimized_inference"),
            ("cuda", "int", "dequantize"),
        ],
    )
    def test_of_compressed_tensors_dequantises_unless_the_device_multiplies_fp8(
        self, device: str, kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(quantization, "find_spec", lambda _: "found")
        groups = {"group_0": {"weights": {"num_bits": 8, "type": kind}}}
        checkpoint = Checkpoint({"quant_method": "compressed-tensors", "config_groups": groups})
        options = (checkpoint, torch.device(device), torch.bfloat16)
        assert quantization.choose(config(Path(), None), *options) is None
        assert checkpoint.quantization_config[wanted] is True

    @pytest.mark.parametrize("name", ["int8", "int4", "fp8", "awq", "eetq"])
    def test_of_another_format_than_the_checkpoints_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"quantised already \(gptq\), not with {name}"):
            choose(name, {"quant_method": "gptq", "bits": 4})

    @pytest.mark.parametrize(
        ("name", "described", "packages"),
        [
            ("gptq", {"quant_method": "gptq"}, "gptqmodel, optimum"),
            ("marlin", {"quant_method": "gptq"}, "gptqmodel, optimum"),
            (None, {"quant_method": "awq"}, "accelerate, gptqmodel"),
            ("bitsandbytes-nf4", {"load_in_4bit": True}, "accelerate, bitsandbytes"),
        ],
    )
    def test_of_a_format_whose_packages_are_missing_names_them(
        self,
        name: str | None,
        described: dict[str, Any],
        packages: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(quantization, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match=f"are not installed: {packages}$"):
            choose(name, described)

    @pytest.mark.parametrize("method", ["exl2", "marlin", "None"])
    def test_of_a_format_that_transformers_does_not_load_is_refused(self, method: str) -> None:
        with pytest.raises(ValueError, match=f"transformers does not load .* with {method}"):
            choose(None, {"quant_method": method})

    def test_of_a_format_that_transformers_loads_is_none(self) -> None:
        assert choose(None, {"quant_method": "fbgemm_fp8"}) is None
        assert choose("fp8", {"quant_method": "fbgemm_fp8"}) is None

    def test_without_native_kernels_is_torchs_layer(self) -> None:
        kernels_for("whole")
        linear = nn.Linear(64, 64)
        native, plain = choose("int8"), choose("int8", enable_native_kernels=False)
        half = choose("int8", dtype=torch.bfloat16)
        assert native is not None
        assert plain is not None
        assert half is not None
        assert isinstance(native.make(linear), PackedInt8Linear)
        assert isinstance(plain.make(linear), Int8Linear)
        assert isinstance(half.make(linear), Int8Linear)

    def test_accepts_every_name_of_the_settings(self) -> None:
        served = {name for name in get_args(Quantization) if name in quantization._ON_LOADING}
        assert served == quantization._ON_LOADING
        for name in set(get_args(Quantization)) - served:
            with pytest.raises(ValueError, match=f"quantize={name} is for"):
                choose(name)

    def test_is_set_by_tgis_flag_and_variable(self) -> None:
        for arguments, environment in (({"quantize": "eetq"}, {}), ({}, {"QUANTIZE": "eetq"})):
            settings = load_settings(arguments, environment)
            assert settings.engine_config(Path("/s")).quantize == "eetq"


class TestModels:
    """Whole models that a scheme is applied to."""

    @staticmethod
    def loaded(name: str, scheme: Scheme | None) -> LoadedModel:
        loaded = attach_paged_attention(
            build_model(ARCHITECTURES[name](), scale=1.0), CPU, torch.float32
        )
        return replace(loaded, scheme=scheme)

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_int8_changes_logits_little(self, name: str) -> None:
        model, scheme = build_model(ARCHITECTURES[name](), scale=1.0), choose("int8")
        assert scheme is not None
        ids = torch.arange(3, 60).unsqueeze(0)
        with torch.inference_mode():
            expected = model(ids).logits
            quantization.apply(model, scheme)
            assert relative_error(model(ids).logits, expected) < 0.05
        assert not {type(module) for module in model.modules()} & {nn.Linear, Conv1D}

    def test_int4_gives_the_output_layer_and_layers_without_whole_groups_8_bits(self) -> None:
        kernels_for("whole")
        model: Any = build_model(LlamaConfig(**{**SMALL, "intermediate_size": 72}), scale=1.0)
        total = sum(parameter.numel() for parameter in model.parameters())
        in_8_bits = 128 * 64 + 3 * 64 * 72  # the output layer, and down_proj of each layer
        loaded = attach_paged_attention(model, CPU, torch.float32)
        note = quantize_model(replace(loaded, scheme=choose("int4")))
        assert note is not None
        parts = rf"\d+% of the weights are quantised to int4, {in_8_bits / total:.0%} to int8, .*"
        assert re.fullmatch(parts, note)
        assert type(model.lm_head) is PackedInt8Linear
        assert type(model.model.layers[0].mlp.down_proj) is PackedInt8Linear
        assert type(model.model.layers[0].mlp.up_proj) is PackedInt4Linear

    def test_int4_has_smaller_groups_where_larger_ones_are_not_whole(self) -> None:
        kernels_for("whole")
        loaded = self.loaded("llama", choose("int4"))
        quantize_model(loaded)
        model: Any = loaded.model
        mlp = model.model.layers[0].mlp
        assert mlp.up_proj.quantized.groups.shape[1] == 64 // 64
        assert mlp.down_proj.quantized.groups.shape[1] == 96 // 32

    def test_int4_without_whole_groups_anywhere_is_called_int8(self) -> None:
        kernels_for("whole")
        config = LlamaConfig(**{**SMALL, "hidden_size": 80, "intermediate_size": 72})
        model = build_model(config, scale=1.0)
        loaded = attach_paged_attention(model, CPU, torch.float32)
        note = quantize_model(replace(loaded, scheme=choose("int4")))
        assert note is not None
        assert re.fullmatch(r"\d+% of the weights are quantised to int8, \d+% stay .*", note)
        assert not any(type(module) is nn.Linear for module in model.modules())

    def test_int4_of_torch_leaves_the_output_layer(self) -> None:
        loaded = self.loaded("llama", choose("int4", enable_native_kernels=False))
        quantize_model(loaded)
        model: Any = loaded.model
        assert type(model.lm_head) is nn.Linear
        assert type(model.model.layers[0].mlp.up_proj) is Int4Linear

    def test_without_a_scheme_stay_as_they_are(self) -> None:
        loaded = self.loaded("llama", None)
        before = [type(module) for module in loaded.model.modules()]
        assert quantize_model(loaded) is None
        assert [type(module) for module in loaded.model.modules()] == before

    def test_say_what_share_is_left_where_experts_are_most_of_the_weights(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = MixtralConfig(**{**SMALL, "intermediate_size": 512}, num_local_experts=8)
        loaded = attach_paged_attention(build_model(config, scale=1.0), CPU, torch.float32)
        note = quantize_model(replace(loaded, scheme=choose("int8", enable_native_kernels=False)))
        assert note is not None
        assert note in caplog.text
        experts = 3 * 8 * 3 * 64 * 512  # layers, experts, matrices
        assert note.endswith(f"({experts / 1e6:,.1f} million of them in experts of mixtures)")
        others = sum(parameter.numel() for parameter in loaded.model.parameters()) - experts
        share = int(note.partition("%")[0]) / 100
        linear = 3 * (64 * 64 * 2 + 64 * 32 * 2) + 64 * 128
        assert share == pytest.approx(linear / (linear + experts + others), abs=0.006)

    def test_with_states_count_no_convolutions_as_experts(self) -> None:
        kernels_for("whole")
        model = build_model(STATEFUL["bamba"](), scale=1.0)
        loaded = attach_paged_attention(model, CPU, torch.float32)
        note = quantize_model(replace(loaded, scheme=choose("int8")))
        assert note is not None
        assert "experts" not in note

    @pytest.mark.parametrize("factor", [0.0, torch.nan])
    def test_whose_logits_change_too_much_are_refused(self, factor: float) -> None:
        class Spoilt(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.layer(x) * factor
                return result

        plain = Scheme("int8", Spoilt, lambda weight: True)
        scheme = replace(plain, output=plain)
        with pytest.raises(ModelLoadError, match="quantize=int8 spoils this model"):
            quantize_model(self.loaded("llama", scheme))

    def test_whose_device_lacks_a_kernel_are_refused(self) -> None:
        def make(layer: nn.Module) -> nn.Module:
            raise NotImplementedError("no such kernel\nand more")

        with pytest.raises(ModelLoadError, match="quantize=int4 does not run here: no such kernel"):
            quantize_model(self.loaded("llama", Scheme("int4", make, lambda weight: True)))

    def test_without_a_layer_that_fits_are_refused(self) -> None:
        scheme = Scheme("int4", Int4Linear.from_linear, lambda weight: False)
        with pytest.raises(ModelLoadError, match="has no layer that fits int4"):
            quantize_model(self.loaded("llama", scheme))

    def test_with_tied_embeddings_keep_them(self) -> None:
        model = build_model(
            GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=True)
        )
        embeddings = model.get_input_embeddings().weight
        scheme = choose("int8")
        assert scheme is not None
        quantization.apply(model, scheme)
        assert model.get_input_embeddings().weight is embeddings
        assert not isinstance(model.get_output_embeddings(), nn.Linear)


class TestLoading:
    """Loading a checkpoint with `quantize`."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @staticmethod
    def describe(path: Path, quantization_config: Any) -> None:
        file = path / "config.json"
        content = json.loads(file.read_text()) | {"quantization_config": quantization_config}
        file.write_text(json.dumps(content))

    def test_refuses_a_wrong_format_in_one_line_with_the_model_id(self, checkpoint: Path) -> None:
        with pytest.raises(ModelLoadError, match="quantize=awq is for checkpoints") as caught:
            load_model(config(checkpoint, "awq"))
        assert "\n" not in str(caught.value)
        assert str(checkpoint) in str(caught.value)

    def test_refuses_a_described_format_that_transformers_does_not_load(
        self, checkpoint: Path
    ) -> None:
        self.describe(checkpoint, {"quant_method": "exl2", "bits": 4.0})
        with pytest.raises(ModelLoadError, match="transformers does not load"):
            load_model(config(checkpoint, None))

    @pytest.mark.parametrize("quantize", [None, "compressed-tensors"])
    def test_reads_compressed_tensors(self, checkpoint: Path, quantize: str | None) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        exact = load_model(config(checkpoint, None)).model
        compress(checkpoint)
        loaded = load_model(config(checkpoint, quantize))
        assert loaded.scheme is None
        ids = torch.arange(3, 60).unsqueeze(0)
        with threads(1):  # building an engine sets their number
            engine, _ = build_engine(config(checkpoint, quantize))
        assert token_ids(
            run(engine, Request(request_id="r", prompt_token_ids=(3, 4, 5), max_new_tokens=24))["r"]
        )
        exact.set_attn_implementation("sdpa")
        loaded.model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            error = relative_error(loaded.model(ids).logits, exact(ids).logits)
        assert 0 < error < 0.2

    @pytest.mark.parametrize(("quantize", "kind"), [("int8", "int8"), ("int4", "int4")])
    def test_quantises_anew_what_was_dequantised(
        self, checkpoint: Path, quantize: str, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        kernels_for("whole")
        caplog.set_level(logging.INFO)
        compress(checkpoint)
        loaded = load_model(config(checkpoint, quantize))
        assert "quantised weights of 8 bits are dequantised to float32" in caplog.messages
        note = quantize_model(loaded)
        assert note is not None
        assert f"quantised to {kind}" in note

    def test_tells_how_dequantised_weights_become_small(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        caplog.set_level(logging.INFO)
        compress(checkpoint)
        load_model(config(checkpoint, None))
        assert (
            "quantised weights of 8 bits are dequantised to float32; --quantize int8 or int4 makes "
            "them small again" in caplog.messages
        )

    def test_refuses_quantised_weights_without_scales_before_it_loads_them(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        monkeypatch.delattr(loading, "_load_weights")
        name = "model.layers.1.mlp.down_proj.weight"
        compress(checkpoint, without=f"{name}_scale")
        with pytest.raises(ModelLoadError) as caught:
            load_model(config(checkpoint, None))
        assert str(caught.value).endswith(
            f": {name} is quantised, and the checkpoint lacks {name}_scale"
        )

    def test_refuses_scales_of_wrong_shapes(self, checkpoint: Path) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        compress(checkpoint)
        weights = checkpoint / "model.safetensors"
        name = "model.layers.1.mlp.down_proj.weight"
        tensors = load_file(weights) | {f"{name}_scale": torch.ones(3)}
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=f"{re.escape(name)} cannot be made of the"):
            load_model(config(checkpoint, None))

    def test_refuses_what_a_dequantised_model_leaves_out(self, checkpoint: Path) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        compress(checkpoint)
        weights = checkpoint / "model.safetensors"
        name = "model.layers.0.mlp.up_proj.bias"
        save_file(load_file(weights) | {name: torch.ones(2)}, weights, metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=f"leaves out {re.escape(name)}$"):
            load_model(config(checkpoint, None))

    @pytest.mark.parametrize(
        ("described", "message"),
        [
            ("int8", "(its configuration: quantization_config is 'int8')"),
            ({"config_groups": []}, None),
            ({"config_groups": ["all"]}, "config_groups has no objects. Given: ['all']"),
            ({"config_groups": {"g": None}}, "config_groups has no objects. Given: {'g': None}"),
            (
                {"config_groups": {"g": {"weights": {"num_bits": "8"}}}},
                "weights.num_bits must be an integer. Given: {'num_bits': '8'}",
            ),
        ],
    )
    def test_names_what_is_wrong_in_a_description(
        self, checkpoint: Path, described: Any, message: str | None
    ) -> None:
        pytest.importorskip("compressed_tensors", reason="the extra `quantized`")
        if isinstance(described, dict):
            described |= {"quant_method": "compressed-tensors"}
        self.describe(checkpoint, described)
        if message is None:  # no layer is quantised
            load_model(config(checkpoint, None))
            return
        with pytest.raises(ModelLoadError) as caught:
            load_model(config(checkpoint, None))
        assert str(caught.value).endswith(message)
