"""Headers of GGUF files: what they have, and files that are no models."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from service.checkpoint.directory import check_checkpoint
from service.checkpoint.gguf import read_gguf
from service.checkpoint.path import resolve
from tests.gguf_models import write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", Kind.Q4_0)


def refusal(path: Path) -> str:
    with pytest.raises((OSError, ValueError)) as caught:
        check_checkpoint(str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_a_header_is_what_the_reference_reads(whole: Path) -> None:
    file, reference = read_gguf(whole), GGUFReader(whole)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (list(value) if isinstance(value, tuple) else value) == field.contents()
    assert [(t.name, t.shape, t.kind, file.data_start + t.offset) for t in file.tensors] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), t.data_offset)
        for t in reference.tensors
    ]
    file.check()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0])
def test_formats_that_are_loaded_pass(tmp_path: Path, kind: Kind) -> None:
    check_checkpoint(str(write_gguf(tmp_path / "model.gguf", kind)))


def test_a_directory_with_one_file_stands_for_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "only.gguf")
    check_checkpoint(str(tmp_path))
    assert resolve(str(tmp_path)) == str(path)
    (tmp_path / "config.json").write_text("{}")  # which is of no use without other weights
    assert resolve(str(tmp_path)) == str(path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == str(tmp_path)


def test_a_directory_with_several_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("b-Q8_0.gguf", "a-Q4_0.gguf"):
        write_gguf(tmp_path / name)
    assert refusal(tmp_path).endswith("give the path of one: a-Q4_0.gguf, b-Q8_0.gguf")
    check_checkpoint(str(tmp_path / "a-Q4_0.gguf"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is no GGUF file: it has 0 bytes"),
        (b"GGML" * 9, "is no GGUF file: it does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 of GGUF is not known, only 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "is no model: it has no architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "header of .* is truncated or damaged"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"name",
            "the header of .* is truncated or damaged",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**60),
            "the header of .* is truncated or damaged",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 999,
            "arrays of type 9 in metadata are not known",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, error: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    started = time.thread_time()
    assert re.search(error, refusal(path))
    assert time.thread_time() - started < 5  # whatever sizes it claims


def test_every_truncation_is_found(whole: Path, tmp_path: Path) -> None:
    data, start = whole.read_bytes(), read_gguf(whole).data_start
    path = tmp_path / "cut.gguf"
    for size in (5, 23, 24, 40, 2000, start // 2, start - 100, start, start + 1, len(data) - 100):
        path.write_bytes(data[:size])
        assert re.search("truncated", refusal(path)), size


def test_a_part_of_a_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", vocabulary={"split.count": 3})
    assert refusal(path).endswith(
        "is one of 3 parts of a model; `llama-gguf-split --merge` makes one file of them"
    )


def test_a_format_that_is_not_loaded(tmp_path: Path, whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    name = b"blk.1.ffn_up.weight"
    kind_at = data.index(name) + len(name) + 4 + 2 * 8
    data[kind_at : kind_at + 4] = struct.pack("<I", Kind.Q8_K)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert re.search(
        r"^blk\.1\.ffn_up\.weight in .* is of type Q8_K, which is not loaded; `llama-quantize "
        "--allow-requantize` converts",
        refusal(path),
    )
    data[kind_at : kind_at + 4] = struct.pack("<I", 200)
    path.write_bytes(data)
    assert "is of type 200, which is not loaded" in refusal(path)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", vocabulary={"tokenizer.ggml.tokens": None})
    assert refusal(path) == f"there is no tokenizer in {path}: tokenizer.ggml is missing"


@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
@pytest.mark.parametrize("index", [4096, "x"])
def test_a_special_token_that_there_is_not(tmp_path: Path, name: str, index: object) -> None:
    key = f"tokenizer.ggml.{name}_token_id"
    path = write_gguf(tmp_path / "model.gguf", vocabulary={key: index})
    assert refusal(path) == f"{path}: {key} must be an id <= 4095. Given: {index}"


def test_more_layers_than_the_file_says_that_it_has(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    key = b"llama.block_count"
    value_at = data.index(key) + len(key) + 4
    data[value_at : value_at + 4] = struct.pack("<I", 1)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert re.search(r" has blk\.1\.\S+, and llama\.block_count is 1$", refusal(path))
    data[data.index(key)] ^= 1  # another name
    path.write_bytes(data)
    assert refusal(path) == f"{path} lacks llama.block_count"


@pytest.mark.parametrize("name", ["sha256-4d7a", "model.GGUF"])
def test_a_file_of_another_name(whole: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(whole.read_bytes())
    assert refusal(path).endswith(
        "is a GGUF file; its name, or that of a link, has to end in .gguf"
    )


def test_tokens_that_the_embedding_lacks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", embedding_rows=4000)
    assert refusal(path) == (
        f"the tokenizer in {path} does not belong to this model: it has ids up to 4095, and the "
        "embedding has 4000 rows"
    )
