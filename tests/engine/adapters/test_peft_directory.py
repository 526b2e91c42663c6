"""Adapters that cannot be applied are refused, in one line that says why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapters.peft_directory import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from engine.build import build_engine
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from tests.engine.model.architectures import ARCHITECTURES, build_model

_LAYER = "model.layers.0.self_attn.q_proj"
_PREFIX = f"base_model.model.{_LAYER}"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
TENSORS: dict[str, Tensor] = {
    f"{_PREFIX}.lora_A.weight": torch.ones(2, 64),
    f"{_PREFIX}.lora_B.weight": torch.ones(64, 2),
}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def write(
    path: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG_NAME).write_text(json.dumps(CONFIG | (config or {})))
    save_file(TENSORS | (tensors or {}), path / WEIGHTS_NAME)
    return path


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 1}}, 0.5),
        ({"alpha_pattern": {"k_proj": 1, "layers.0.*q_proj": 8}}, 4.0),
        ({"r": 16, "rank_pattern": {_LAYER: 2}}, 3.0),
        ({"r": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"proj": 1}}, 3.0),
    ],
    ids=str,
)
def test_the_scale_is_that_of_the_layer(
    config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    update = read_adapter("x", str(write(tmp_path, config))).updates[_LAYER]
    assert torch.equal(update.down, torch.ones(2, 64))
    assert torch.allclose(update.up, torch.full((64, 2), scale))


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    update = read_adapter("x", str(write(tmp_path, None, halves))).updates[_LAYER]
    assert update.down.dtype is update.up.dtype is torch.float32


def test_adapters_have_equal_digests_only_if_they_are_equal(tmp_path: Path) -> None:
    digests = [
        read_adapter(name, str(write(tmp_path / name, config, tensors))).digest
        for name, config, tensors in [
            ("a", {}, {}),
            ("b", {}, {}),
            ("c", {"lora_alpha": 7}, {}),
            ("d", {}, {f"{_PREFIX}.lora_A.weight": torch.zeros(2, 64)}),
        ]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "its peft_type is IA3; only LORA is applied"),
        ({"peft_type": None}, "its peft_type is None; only LORA is applied"),
        ({"use_dora": True}, "it has DoRA, which is not applied"),
        (
            {"modules_to_save": ["lm_head"]},
            "it has whole layers (modules_to_save), which is not applied",
        ),
        ({"bias": "all"}, "it has biases (bias=all), which are not applied"),
        ({"lora_bias": True}, "it has biases (lora_bias), which is not applied"),
        (
            {"target_parameters": ["experts.down_proj"]},
            "it has parameters that are not of linear layers (target_parameters), which is not "
            "applied",
        ),
        ({"layer_replication": [[0, 2]]}, "it has layer_replication, which is not applied"),
        ({"made_up_later": 1}, "it has made_up_later, which is not applied"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "it was started with init_lora_weights=pissa_niter_4, which changes the weights of the "
            "base model; save it with PEFT's path_initial_model_for_weight_conversion",
        ),
        ({"use_rslora": "no"}, f"{CONFIG_NAME}: use_rslora is neither true nor false"),
        ({"rank_pattern": {"q_proj": "2"}}, f"the rank of {_LAYER} is not a number above 0"),
        ({"r": 0}, f"{CONFIG_NAME}: r is not a number above 0"),
        ({"lora_alpha": "16"}, f"{CONFIG_NAME}: lora_alpha is not a number above 0"),
        ({"rank_pattern": [1]}, f"{CONFIG_NAME}: rank_pattern is not an object"),
        (
            {"rank_pattern": {"x" * 1025: 1}},
            f"{CONFIG_NAME}: rank_pattern has more than 1024 keys, or one longer than 1024",
        ),
        ({"rank_pattern": {"(": 1}}, f"{CONFIG_NAME}: ( is no regular expression: missing )"),
        (
            {"alpha_pattern": {r"(?:(.+?)|\3){40}\d": 1}},
            f"{CONFIG_NAME}: (?:(.+?)|\\3){{40}}\\d takes too long to match",
        ),
        ({"alpha_pattern": {"q_proj": None}}, f"the alpha of {_LAYER} is not a number above 0"),
        ({"r": 3}, f"{_LAYER} has lora_A [2, 64] and lora_B [64, 2], but its rank is 3"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_applied(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read_adapter("mine", str(write(tmp_path, config)))
    assert str(caught.value).startswith(f"adapter mine: {reason}")


def test_time_that_other_threads_take_does_not_count_for_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps are computed the library's limit, of the whole process, is soon reached."""
    match, tries = regex.match, []

    def beside_steps(*args: Any, **options: Any) -> Any:
        tries.append(args)
        if len(tries) % 3:
            raise TimeoutError
        return match(*args, **options)

    directory = write(tmp_path, {"rank_pattern": {"k_proj": 1, "q_proj": 2}, "r": 3})
    monkeypatch.setattr(regex, "match", beside_steps)
    assert {
        update.down.shape[0] for update in read_adapter("mine", str(directory)).updates.values()
    } == {2}
    assert len(tries) == 6


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (
            f"{_PREFIX}.lora_magnitude_vector",
            torch.ones(64),
            f"DoRA ({_LAYER}.lora_magnitude_vector) is not applied",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            torch.ones(2, 128),
            "an update of an embedding (model.embed_tokens.lora_embedding_A) is not applied",
        ),
        (
            f"{_PREFIX}.lora_B.bias",
            torch.ones(64),
            f"a bias ({_LAYER}.lora_B.bias) is not applied",
        ),
        (
            "base_model.model.lm_head.weight",
            torch.ones(128, 64),
            "a whole layer (modules_to_save) (lm_head.weight) is not applied",
        ),
        (
            "model.layers.0.x",
            torch.ones(1),
            f"{WEIGHTS_NAME}: model.layers.0.x does not begin with base_model.model.",
        ),
        (
            "base_model.model.a.lora_A.weight",
            torch.ones(2, 64),
            "a has no lora_B",
        ),
        (
            f"{_PREFIX}.lora_A.weight",
            torch.full((2, 64), math.nan),
            f"{_LAYER}.lora_A has values that are not finite",
        ),
        (
            f"{_PREFIX}.lora_B.weight",
            torch.ones(64, 2, dtype=torch.int64),
            f"{_LAYER}.lora_B is torch.int64 [64, 2], not a matrix of floats",
        ),
    ],
)
def test_tensors_that_cannot_be_applied(
    name: str, tensor: Tensor, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read_adapter("mine", str(write(tmp_path, None, {name: tensor})))
    assert str(caught.value) == f"adapter mine: {reason}"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: (path / CONFIG_NAME).unlink(), f"has no {CONFIG_NAME}, so it is not an"),
        (lambda path: (path / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
        (
            lambda path: (path / WEIGHTS_NAME).rename(
                path / "adapter_model-00001-of-00002.safetensors"
            ),
            "are in shards, and adapter_model.safetensors is missing: save it as one file",
        ),
        (
            lambda path: (path / WEIGHTS_NAME).rename(path / "adapter_model.bin"),
            "has only adapter_model.bin, a format that can run code: save it as safetensors",
        ),
        (lambda path: (path / CONFIG_NAME).write_text("{"), f"{CONFIG_NAME} is not JSON"),
        (lambda path: (path / CONFIG_NAME).write_text("[]"), f"{CONFIG_NAME} is not an object"),
        (
            lambda path: (path / CONFIG_NAME).write_text(LFS_POINTER),
            f"{CONFIG_NAME} is a pointer of git-lfs and not the file itself; `git lfs pull`",
        ),
        (
            lambda path: (path / WEIGHTS_NAME).write_text(LFS_POINTER),
            f"{WEIGHTS_NAME} is a pointer of git-lfs and not the file itself; `git lfs pull`",
        ),
        (
            lambda path: (path / WEIGHTS_NAME).write_bytes(
                (path / WEIGHTS_NAME).read_bytes()[:-20]
            ),
            f"{WEIGHTS_NAME} is broken",
        ),
    ],
    ids=[
        "no config",
        "no weights",
        "shards",
        "pickle",
        "no json",
        "a list",
        "pointer",
        "pointers",
        "cut off",
    ],
)
def test_files_that_cannot_be_read(
    break_it: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    break_it(write(tmp_path))
    with pytest.raises(ModelLoadError) as caught:
        read_adapter("mine", str(tmp_path))
    assert str(caught.value).startswith("adapter mine: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"adapter mine: there is no directory /.*/none"):
        read_adapter("mine", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        ("model.layers.9.mlp.up_proj", (96, 64), "the model has no linear layer model.layers.9.m"),
        ("model.embed_tokens", (64, 128), "the model has no linear layer model.embed_tokens"),
        ("model.layers.0.mlp.gate_up_proj", (192, 64), "the model has no linear layer model.laye"),
        ("lm_head", (128, 64), "an update of the output layer (lm_head) is not applied"),
        (
            "model.layers.2.mlp.up_proj",
            (96, 32),
            "its update of model.layers.2.mlp.up_proj is for a weight [96, 32], and the model's is "
            "[96, 64]",
        ),
        (
            "model.layers.0.self_attn.k_proj",
            (64, 64),
            "its update of model.layers.0.self_attn.k_proj is for a weight [64, 64], and the "
            "model's is [32, 64]",
        ),
    ],
)
def test_an_adapter_for_another_model(
    layer: str, shape: tuple[int, int], reason: str, tmp_path: Path
) -> None:
    build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path / "model")
    name, (out_features, in_features) = f"base_model.model.{layer}", shape
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, in_features),
        f"{name}.lora_B.weight": torch.ones(out_features, 2),
    }
    path = write(tmp_path / "adapter")
    save_file(load_file(path / WEIGHTS_NAME) | tensors, path / WEIGHTS_NAME)
    config = EngineConfig(
        model_id=str(tmp_path / "model"),
        socket_path=tmp_path / "socket",
        device="cpu",
        num_threads=1,
        adapters=(("mine", str(path)),),
    )
    with pytest.raises(ModelLoadError) as caught:
        build_engine(config)
    assert str(caught.value).startswith(f"adapter mine: {reason}")


def test_a_directory_below_the_home_of_whoever_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine")
    assert read_adapter("mine", "~/mine").name == "mine"
    with pytest.raises(ModelLoadError, match="adapter mine: there is no directory ~/none"):
        read_adapter("mine", "~/none")


def test_files_may_lie_below_a_directory_only(tmp_path: Path) -> None:
    path, root = write(tmp_path / "elsewhere"), tmp_path / "root"
    root.mkdir()
    inside = write(root / "inside")
    assert read_adapter("mine", str(inside), root).name == "mine"
    (inside / CONFIG_NAME).rename(root / "config")
    (inside / CONFIG_NAME).symlink_to("../config")
    assert read_adapter("mine", str(inside), root).name == "mine"
    (inside / CONFIG_NAME).unlink()
    (inside / CONFIG_NAME).symlink_to(path / CONFIG_NAME)
    with pytest.raises(ModelLoadError, match="a file of it is a link to somewhere else"):
        read_adapter("mine", str(inside), root)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    with (path / CONFIG_NAME).open("ab") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(ModelLoadError, match="has 1048577 bytes, more than 1048576"):
        read_adapter("mine", str(path))
