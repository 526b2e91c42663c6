"""GGUF files, served with the weights and the tokens that transformers reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import dequantize, quantize
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.kernels.grouped_int8 import GroupedInt8Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.quantized_linear import QuantizedLinear
from engine.model import loading
from engine.model.loading import load_model
from engine.model.prepare import prepare
from engine.model.quantized_linear import Int4Linear
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.quantized import config, relative_error
from tests.engine.native import kernels_for
from tests.gguf_models import LAYERS, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = (5, 77, 1234, 4000, 9)


def stock(path: Path) -> Any:
    """The model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tmp_path / "model.gguf", kind)
    reference = stock(path).generate(
        torch.tensor([PROMPT]), do_sample=False, min_new_tokens=30, max_new_tokens=30
    )
    engine, _ = build_engine(config(path, None, max_batch_total_tokens=1024))
    engine.add(Request(request_id="a", prompt_token_ids=PROMPT, max_new_tokens=30))
    assert token_ids(run(engine)["a"]) == reference[0, len(PROMPT) :].tolist()


def test_that_weights_are_dequantised_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write_gguf(tmp_path / "model.gguf", Kind.Q8_0)
    load_model(config(path, None))
    assert (
        "weights of a GGUF file are dequantised to float32; --quantize int8 or int4 makes them "
        "small again" in caplog.messages
    )


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture="plamo")
    with pytest.raises(ModelLoadError) as caught:
        load_model(config(path, None))
    assert str(caught.value) == (
        f"cannot load {path}: GGUF model with architecture plamo is not supported yet. "
        "Load the checkpoint that the file was made of, in safetensors"
    )


def test_biases_that_the_model_leaves_out_are_named_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loading, "_load_weights")
    path = write_gguf(
        tmp_path / "model.gguf", tensors={"blk.1.attn_q.bias": np.ones(128, np.float32)}
    )
    with pytest.raises(ModelLoadError, match=r"leaves out biases .* has blk\.1\.attn_q\.bias$"):
        load_model(config(path, None))


def linear_error(layer: torch.nn.Linear) -> float:
    """How far a layer of 4 bits is from the weight that it is made of."""
    quantized = Int4Linear.from_linear(layer)
    columns = torch.eye(layer.in_features)
    return relative_error(quantized(columns), layer(columns))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_four_bits_are_kept(kind: Kind) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    requantized = linear_error(layer)
    blocks = four_bits(layer.weight.detach().numpy(), kind)
    layer.weight.data = torch.from_numpy(dequantize(blocks, kind).copy())
    assert Int4Linear.from_linear(layer).group_size == 32
    assert linear_error(layer) < 0.005 < 0.05 < requantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_four_bits_are_found_in_rounded_weights(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    blocks = four_bits(layer.weight.detach().numpy(), kind)
    layer.weight.data = torch.from_numpy(dequantize(blocks, kind).copy()).to(dtype).float()
    assert Int4Linear.from_linear(layer).group_size == 32
    assert linear_error(layer) < 0.01


def four_bits(weight: Any, kind: Kind) -> Any:
    """Blocks of a format; those of Q4_K, which the package does not write, have random contents."""
    if kind is not Kind.Q4_K:
        return quantize(weight, kind)
    blocks = np.random.default_rng(0).integers(0, 256, (64, 144), np.uint8)
    blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    return blocks


def test_other_weights_have_groups_of_their_own() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64)
    assert Int4Linear.from_linear(layer).group_size == 64
    layer.weight.data = torch.from_numpy(
        dequantize(quantize(layer.weight.detach().numpy(), Kind.Q5_0), Kind.Q5_0).copy()
    )
    assert Int4Linear.from_linear(layer).group_size == 64


def test_eight_bits_are_kept_in_every_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels_for("whole")
    caplog.set_level(logging.INFO)
    path = write_gguf(tmp_path / "model.gguf", Kind.Q8_0)
    prepared = prepare(config(path, "int8", max_batch_total_tokens=1024))
    kinds = {type(m) for m in prepared.loaded.model.modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {GroupedInt8Linear}
    num_layers = LAYERS * 6 + 1  # gate and up are one
    assert (
        f"{num_layers} layers keep the 8 bits and the scales that they were stored in"
        in caplog.messages
    )


def test_kept_eight_bits_are_nearer_to_the_file_than_rounded_ones() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 64, bias=False)
    blocks = quantize(layer.weight.detach().numpy(), Kind.Q8_0)
    layer.weight.data = torch.from_numpy(dequantize(blocks, Kind.Q8_0).copy())
    kernels, x = kernels_for("whole"), torch.randint(-127, 128, (50, 512)).float()
    x[:, 0] = 127.0  # so activations are not rounded
    expected = layer(x)
    assert relative_error(GroupedInt8Linear.from_linear(layer, kernels)(x), expected) < 1e-6
    assert relative_error(PackedInt8Linear.from_linear(layer, kernels)(x), expected) > 1e-3


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_file_can_be_served_with_fewer_bits(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", Kind.Q4_1)
    engine, _ = build_engine(config(path, name, max_batch_total_tokens=1024))
    engine.add(Request(request_id="a", prompt_token_ids=PROMPT, max_new_tokens=8))
    assert len(token_ids(run(engine)["a"])) == 8
