"""transformers finds in a GGUF file what the package `gguf` alone would let it find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.model.gguf_reading import quick_gguf
from tests.gguf_models import write_gguf

OTHERS: dict[str, Any] = {
    "tokenizer.ggml.more_numbers": [1, -2, 3],
    "tokenizer.ggml.more_parts": [0.5, 1.5],
    "tokenizer.ggml.more_answers": [True, False],
    "tokenizer.ggml.more_words": ["", "ä", "日本"],
    "tokenizer.ggml.one_word": ["alone"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", vocabulary=OTHERS)


def test_the_metadata_is_the_same(file: Path) -> None:
    expected = load_gguf_checkpoint(str(file))
    with quick_gguf():
        assert load_gguf_checkpoint(str(file)) == expected
        assert expected["tokenizer"]["tokens"]


def test_arrays_of_all_kinds_are_the_same(file: Path) -> None:
    ours_of = gguf_reader_within()
    theirs, ours = gguf.GGUFReader(file), ours_of(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types, name
        values = [
            [bytes(each.parts[at]) for at in each.data] for each in (field, ours.fields[name])
        ]
        assert values[0] == values[1], name
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    assert all(
        (one.data == other.data).all()
        for one, other in zip(ours.tensors, theirs.tensors, strict=True)
    )


def values(field: gguf.ReaderField) -> list[bytes]:
    """The values of a field as they stand in the file."""
    return [bytes(field.parts[at]) for at in field.data]


def gguf_reader_within() -> Any:
    """The class of readers that there is while a model is loaded."""
    with quick_gguf():
        return gguf.GGUFReader


def test_a_file_is_read_once_and_the_package_stays_as_it_was(file: Path) -> None:
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(ValueError, match="broken"), quick_gguf():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        raise ValueError("broken")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
