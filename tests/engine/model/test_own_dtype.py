"""In which format a GPU computes a checkpoint whose user names none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Gemma3Config, LlamaConfig

from engine.model import loading
from engine.model.loading import load_model
from engine.protocol.errors import ModelLoadError
from tests.engine.model.quantized import config

GPU = torch.device("cuda")  # nothing is moved there


def write(path: Path, **named: object) -> None:
    """A configuration as a checkpoint has it."""
    written = LlamaConfig(num_hidden_layers=1).to_dict()
    (path / "config.json").write_text(json.dumps({**written, **named}))


def chosen(path: Path, dtype: str | None = None) -> torch.dtype:
    asked = config(path, None, dtype=dtype)
    return loading._choose_dtype(asked, GPU, AutoConfig.from_pretrained(path))


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),  # its name until transformers 4.56
        ({"dtype": "float64"}, torch.float32),
        ({"dtype": None}, torch.float16),
    ],
    ids=str,
)
def test_it_is_what_the_checkpoint_names(
    tmp_path: Path, named: dict[str, object], expected: torch.dtype
) -> None:
    write(tmp_path, **named)
    assert chosen(tmp_path) is expected


def test_it_is_that_of_the_text_part_where_the_whole_names_none(tmp_path: Path) -> None:
    whole = Gemma3Config(text_config={"dtype": "bfloat16", "num_hidden_layers": 1}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**whole, "dtype": None}))
    assert chosen(tmp_path) is torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "uint8", "bool", "float8_e4m3fn", "complex64"])
def test_a_format_that_nothing_is_computed_in_refuses_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, dtype=name)
    monkeypatch.setattr(loading, "choose_device", lambda _: GPU)
    with pytest.raises(ModelLoadError, match=f"names {name} as its dtype.*--dtype bfloat16"):
        load_model(config(tmp_path, None))
    assert chosen(tmp_path, "bfloat16") is torch.bfloat16
