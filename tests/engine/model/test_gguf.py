"""GGUF files, served with the weights and the tokens that transformers reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.model.loading import load_model
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request
from tests.engine.fakes import run, token_ids
from tests.engine.model.quantized import config
from tests.gguf_models import write_gguf

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
    engine = build_engine(config(path, None, max_batch_total_tokens=128))
    engine.add(Request("a", PROMPT, max_new_tokens=30))
    assert token_ids(run(engine))["a"] == reference[0, len(PROMPT) :].tolist()


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
