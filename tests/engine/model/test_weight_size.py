"""Weights that do not fit into memory, refused before they are loaded."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine.model import weight_size
from engine.model.loading import load_model
from engine.model.weight_size import weight_bytes
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import ARCHITECTURES, build_model
from tests.engine.model.quantized import config
from tests.gguf_models import write_gguf


def bytes_in_memory(model: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_weights_are_counted_as_they_are_in_memory(
    tmp_path: Path, saved: torch.dtype, dtype: torch.dtype, shard_size: str
) -> None:
    build_model(ARCHITECTURES["llama"]()).to(saved).save_pretrained(
        tmp_path, max_shard_size=shard_size
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert weight_bytes(config(tmp_path, None), dtype) == bytes_in_memory(loaded)


def test_weights_of_a_gguf_file_are_counted_as_they_will_be(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", Kind.Q4_0)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    assert weight_bytes(config(path, None), torch.float32) == bytes_in_memory(loaded)


def test_numbers_that_are_quantised_stay_as_they_are(tmp_path: Path) -> None:
    save_file(
        {
            "packed": torch.zeros(5, 3, dtype=torch.int32),
            "eight": torch.zeros(7, dtype=torch.float8_e4m3fn),
            "scale": torch.zeros(2, dtype=torch.bfloat16),
        },
        tmp_path / "model.safetensors",
    )
    save_file({"other": torch.zeros(99)}, tmp_path / "consolidated.safetensors")
    assert weight_bytes(config(tmp_path, None), torch.float32) == 5 * 3 * 4 + 7 + 2 * 4


def test_weights_that_are_dequantised_are_counted_as_they_will_be(tmp_path: Path) -> None:
    numbers = {
        "a.weight": torch.zeros(6, 4, dtype=torch.int8),
        "a.weight_scale": torch.zeros(6, 1),
        "b.weight_packed": torch.zeros(6, 2, dtype=torch.int32),  # 16 of 4 bits in a row
        "c_blocks": torch.zeros(6, 2, dtype=torch.uint8),
    }
    save_file(numbers, tmp_path / "model.safetensors")
    wanted = 4 * (6 * 4 + 6 + 6 * 16 + 6 * 4)
    assert weight_bytes(config(tmp_path, None), torch.float32, 4) == wanted


def test_files_that_the_index_names_are_counted_and_no_others(tmp_path: Path) -> None:
    build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = weight_bytes(config(tmp_path, None), torch.float32)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for part in sorted(tmp_path.glob("model-*.safetensors")):
        text = text.replace(part.name, f"weights-{part.name}")
        part.rename(tmp_path / f"weights-{part.name}")
    index.write_text(text)
    save_file({"x": torch.zeros(99)}, tmp_path / "model-00001-of-00009.safetensors")
    assert weight_bytes(config(tmp_path, None), torch.float32) == expected > 0


@pytest.mark.parametrize("is_gguf", [False, True])
def test_what_does_not_fit_is_refused_in_one_line_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gguf: bool
) -> None:
    path = tmp_path
    if is_gguf:
        path = write_gguf(tmp_path / "model.gguf")
    else:
        build_model(ARCHITECTURES["llama"]()).save_pretrained(path)
    settings = config(path, None)
    needed = weight_bytes(settings, torch.float32)
    monkeypatch.setattr(weight_size, "free_memory", lambda _: needed)
    load_model(settings)
    monkeypatch.setattr(weight_size, "free_memory", lambda _: needed - 1)
    with pytest.raises(ModelLoadError, match=r"its weights take .* GB in float32, and") as caught:
        load_model(settings)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_header_of_a_gguf_file_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = write_gguf(tmp_path / "model.gguf"), []
    read = gguf.GGUFReader.__init__

    def counted(self: gguf.GGUFReader, *arguments: object) -> None:
        reads.append(arguments)
        read(self, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    load_model(config(path, None))
    assert len(reads) == 1
