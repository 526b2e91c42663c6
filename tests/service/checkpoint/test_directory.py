"""Directories that are no models, each with the one line that says why."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.bundled import demo_model
from service.checkpoint.directory import check_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5368709120\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that can be loaded, whose files may be changed."""
    return Path(shutil.copytree(demo_model(), tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same with its weights in two files and an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return model


def refusal(path: Path | str) -> str:
    with pytest.raises((OSError, ValueError)) as caught:
        check_checkpoint(str(path))
    text = str(caught.value)
    assert "\n" not in text
    return text


def shorten(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_whole_models_pass(model: Path, sharded: Path) -> None:
    check_checkpoint(str(sharded))
    check_checkpoint(str(demo_model()))


@pytest.mark.parametrize("name", ["gpt2", "owner/model", "owner/model.v2"])
def test_names_of_the_hub_pass(name: str) -> None:
    check_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "kind"), [("", "directory"), ("a/b/c", "directory"), ("x.gguf", "file")]
)
def test_a_path_to_nothing(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "missing" / name
    assert refusal(path) == f"there is no such {kind}: {path}"


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"0")
    assert refusal(tmp_path / "weights.bin").endswith("neither a model's directory nor a GGUF file")


def test_an_empty_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"there is nothing in {tmp_path}"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "there is no config.json in {}"),
        ("", "{}/config.json is not JSON: Expecting value.*"),
        ('{"model_type": llama}', "{}/config.json is not JSON: Expecting value.*"),
        ("[]", "{}/config.json is not a JSON object"),
        (POINTER, "{}/config.json is a pointer of git-lfs .*"),
        ("[" * 100_000, "{}/config.json is (nested too deeply|not JSON.*)"),
        ('\ufeff{"model_type": "llama"}', "{}/config.json is not JSON: Unexpected UTF-8 BOM .*"),
        ("{}", "{}/config.json has no model_type, the name of an architecture"),
        ('{"model_type": 7}', "{}/config.json has no model_type, the name of an architecture"),
    ],
    ids=["missing", "empty", "broken", "a list", "a pointer", "deep", "mark", "no type", "number"],
)
def test_no_configuration(model: Path, content: str | None, error: str) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    assert re.fullmatch(error.format(re.escape(str(model))), refusal(model))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ([], "there are no weights in {}: neither model.safetensors nor " + INDEX),
        (["pytorch_model.bin"], r".*not in safetensors.*: pytorch_model.bin. To convert.* there"),
        (
            [f"pytorch_model-{n}.bin" for n in range(5)],
            r".*: pytorch_model-0.bin, .*-1.bin, .*-2.bin and 2 more. To convert.*",
        ),
        (["consolidated.00.pth"], r".*not in safetensors.*: consolidated.00.pth. To convert.*"),
        (["other.safetensors"], "{} has other.safetensors, and neither model.safetensors nor .*"),
        (["adapter_config.json", "adapter_model.bin"], "{} is an adapter and no model; .*"),
    ],
)
def test_no_weights_that_are_loaded(model: Path, files: list[str], error: str) -> None:
    (model / "model.safetensors").unlink()
    for name in files:
        (model / name).write_bytes(b"0")
    assert re.fullmatch(error.format(re.escape(str(model))), refusal(model))


def test_the_command_that_converts_weights_converts_them(model: Path) -> None:
    import shlex
    import subprocess
    import sys

    import torch

    weights = model / "model.safetensors"
    expected = load_file(weights)
    torch.save(
        {name: torch.from_numpy(value) for name, value in expected.items()},
        model / "pytorch_model.bin",
    )
    weights.unlink()
    command = re.search(r"To convert them: (.*) there$", refusal(model))
    assert command is not None
    program, *arguments = shlex.split(command[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], cwd=model, check=True, capture_output=True)
    check_checkpoint(str(model))
    converted = load_file(weights)
    assert converted.keys() == expected.keys()
    assert all(np.array_equal(converted[name], expected[name]) for name in expected)


def test_a_pointer_in_place_of_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_text(POINTER)
    assert refusal(model).startswith(f"{model}/model.safetensors is a pointer of git-lfs")


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 7_000_000])
def test_truncated_weights(model: Path, num_bytes: int) -> None:
    shorten(model / "model.safetensors", num_bytes)
    assert refusal(model).startswith(f"{model}/model.safetensors is truncated or damaged")


def test_a_truncated_part(sharded: Path) -> None:
    part = sharded / "model-00002-of-00002.safetensors"
    shorten(part, part.stat().st_size - 1)
    assert refusal(sharded).startswith(f"{part} is truncated or damaged")


def test_a_part_that_is_a_pointer(sharded: Path) -> None:
    part = sharded / "model-00001-of-00002.safetensors"
    part.write_text(POINTER)
    assert refusal(sharded).startswith(f"{part} is a pointer of git-lfs")


def test_a_missing_part(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    assert refusal(sharded) == (
        f"{sharded} lacks model-00001-of-00002.safetensors, of the 2 files of weights that "
        f"{INDEX} names"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_of_nothing(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"{sharded / INDEX} has no weight_map"


@pytest.mark.parametrize(
    "name",
    [1, None, ["model.safetensors"], "/etc/model.safetensors", "../x.safetensors", "model.bin"],
)
def test_an_index_that_names_no_safetensors(sharded: Path, name: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert refusal(sharded) == (
        f"{sharded / INDEX} names {name!r}, which is no file of safetensors beside it"
    )


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "preprocessor_config.json", "processor_config.json"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("content", "error"),
    [("{", "not JSON: .*"), ("[]", "not a JSON object"), (POINTER, "a pointer of git-lfs .*")],
    ids=["broken", "a list", "a pointer"],
)
def test_other_files_that_are_broken(model: Path, name: str, content: str, error: str) -> None:
    (model / name).write_text(content)
    assert re.fullmatch(f"{re.escape(str(model / name))} is {error}", refusal(model))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja"])
def test_a_chat_template_that_is_no_text(model: Path, name: str) -> None:
    file = model / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(POINTER)
    assert refusal(model).startswith(f"{file} is a pointer of git-lfs")
    file.write_bytes(b"\xff\xfe{")
    assert refusal(model).startswith(f"{file} is not a text in UTF-8: ")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", ["two", [1, "two"], 1.5, {}, True])
def test_ends_that_are_no_tokens(model: Path, name: str, ends: object) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {"eos_token_id": ends}))
    assert refusal(model) == (
        f"{model / name}: eos_token_id is {ends!r}, which is no id of a token, nor a list"
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": None}, " is no tokenizer: it has no model"),
        ({"model": {"vocab": {"a": "1"}}}, ": an id of its vocabulary is not an integer"),
        ({"model": {"vocab": {"a": [1]}}}, ": an id of its vocabulary is not an integer"),
        ({"added_tokens": [{"id": {}}]}, ": an id of its vocabulary is not an integer"),
    ],
)
def test_a_tokenizer_of_another_form(model: Path, change: dict[str, object], error: str) -> None:
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert refusal(model) == f"{file}{error}"


@pytest.mark.parametrize(
    ("file", "error"),
    [
        (None, "there is no tokenizer in {}: tokenizer.json is missing"),
        (("tokenizer.json", "{"), "{}/tokenizer.json is not JSON: .*"),
        (("tokenizer.json", POINTER), "{}/tokenizer.json is a pointer of git-lfs .*"),
        (("tokenizer.model", POINTER), "{}/tokenizer.model is a pointer of git-lfs .*"),
    ],
)
def test_no_tokenizer(model: Path, file: tuple[str, str] | None, error: str) -> None:
    (model / "tokenizer.json").unlink()
    if file is not None:
        (model / file[0]).write_text(file[1])
    assert re.fullmatch(error.format(re.escape(str(model))), refusal(model))


def test_merges_that_are_a_pointer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("{}")
    (model / "merges.txt").write_text(POINTER)
    assert refusal(model).startswith(f"{model}/merges.txt is a pointer of git-lfs")


def test_a_tokenizer_that_needs_a_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    check_checkpoint(str(model))  # with the package, it is tried
    monkeypatch.setattr("service.checkpoint.tokenizer_files.find_spec", lambda _: None)
    assert refusal(model) == (
        f"{model} has tokenizer.model and no tokenizer.json; the package sentencepiece, which is "
        "not installed, makes one of the other, or get tokenizer.json from where the model comes "
        "from"
    )


def cut_embedding(model: Path, rows: int) -> None:
    tensors = load_file(model / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name][:rows]
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("rows", [4095, 100])
def test_ordinary_tokens_that_the_embedding_lacks(model: Path, rows: int) -> None:
    cut_embedding(model, rows)
    assert refusal(model) == (
        f"the tokenizer in {model} does not belong to this model: it has ids up to 4095, and the "
        f"embedding has {rows} rows"
    )


def test_an_added_token_that_the_embedding_lacks_is_no_reason(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = {**tokenizer["added_tokens"][0], "id": 4096, "content": "<image>"}
    tokenizer["added_tokens"].append(added)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_checkpoint(str(model))


def test_a_model_with_code_may_have_a_tokenizer_of_its_own(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    (model / "tokenizer.json").unlink()
    check_checkpoint(str(model))
