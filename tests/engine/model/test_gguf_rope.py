"""Scaled rotary embeddings of GGUF files, against those of transformers' configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.attention.paged import ReferenceAttention
from engine.model.loading import load_model
from engine.model.self_check import one_step_logits, relative_difference, stock_logits
from engine.protocol.errors import ModelLoadError
from tests.engine.model.quantized import config
from tests.gguf_models import HEADS, HIDDEN, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

THETA = 10_000.0
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0,
    "original_max_position_embeddings": 32, "beta_fast": 24.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
IN_METADATA = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 32,
    "llama.rope.scaling.yarn_beta_fast": 24.0,
    "llama.rope.scaling.finetuned": True,
}


def stock(path: Path, parameters: dict[str, Any]) -> Any:
    """A file's model as transformers computes it with this rotary embedding."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.config.rope_parameters = parameters
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model


def difference(path: Path, parameters: dict[str, Any]) -> float:
    """Between the logits of the engine and those of transformers."""
    loaded = load_model(config(path, None))
    expected = stock_logits(stock(path, parameters))
    return relative_difference(one_step_logits(loaded, ReferenceAttention()), expected)


def divisors(parameters: dict[str, Any], model: Any) -> Any:
    """What a converter to GGUF writes of Llama 3.1's scaling."""
    plain = THETA ** -(torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    model.config.rope_parameters = parameters
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    return (plain / scaled).float().numpy()


def test_of_llama_3_are_a_tensor_of_divisors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "plain.gguf")
    values = divisors(LLAMA3, stock(path, LLAMA3))
    scaled = write_gguf(tmp_path / "model.gguf", tensors={"rope_freqs.weight": values})
    assert difference(scaled, LLAMA3) < 1e-4 < 1e-2 < difference(path, LLAMA3)


@pytest.mark.parametrize("parameters", [YARN, LINEAR])
def test_in_metadata_are_those_of_transformers(tmp_path: Path, parameters: dict[str, Any]) -> None:
    kind = parameters["rope_type"]
    path = write_gguf(
        tmp_path / "model.gguf", vocabulary=IN_METADATA | {"llama.rope.scaling.type": kind}
    )
    assert difference(path, parameters) < 1e-4


@pytest.mark.parametrize(
    ("changes", "tensors", "named"),
    [
        ({"llama.rope.scaling.type": "longrope"}, {}, "type 'longrope'"),
        ({"llama.rope.scaling.factor": None}, {}, "type 'yarn'"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({}, {"rope_factors_long.weight": torch.ones(16).numpy()}, "rope_factors_long.weight"),
        ({}, {"rope_freqs.weight": torch.ones(15).numpy()}, "rope_freqs.weight"),
    ],
)
def test_of_other_kinds_are_refused(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Any], named: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", vocabulary=IN_METADATA | changes, tensors=tensors)
    with pytest.raises(ModelLoadError, match=r"scales the rotary embedding \(.*" + named):
        load_model(config(path, None))


def test_that_are_none_change_nothing(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "model.gguf", vocabulary=IN_METADATA | {"llama.rope.scaling.type": "none"}
    )
    assert difference(path, {"rope_type": "default", "rope_theta": THETA}) < 1e-4
