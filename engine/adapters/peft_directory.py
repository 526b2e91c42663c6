"""Reads an adapter in the format of the library PEFT: a configuration, and safetensors.

What cannot be applied exactly is refused by its name: an adapter without a part of it answers in
another way than the one that was trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor
from transformers.utils.hub import cached_file

from ..protocol.errors import ModelLoadError, first_line
from ..protocol.git_lfs import POINTER
from .adapter import Adapter, LowRankUpdate

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_SHARDS = "adapter_model-*.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20
_MAX_WEIGHTS_BYTES = 4 << 30  # rank 256 of a model of 70 billion weights takes 3 GiB in 16 bits
_MAX_KEYS = 1024  # of a pattern, and characters of each
_MAX_KEY = 1024
# Processor time for 100 layers, in seconds; keys are regular expressions, which can take for ever.
_PATTERN_S = 1.0
_WEIGHT = regex.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")

# Settings that change nothing in how a trained adapter is applied.
_OF_TRAINING = frozenset(
    {
        "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
        "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config",
        "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip
# Settings that say which layers have an update, which the names of the tensors say as well.
_OF_TARGETS = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
_APPLIED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
)
# Ways to start a training that leave the base model's weights as they are; others change them.
_PLAIN_STARTS = frozenset({True, False, None, "gaussian", "eva", "orthogonal"})
_NAMES = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "parameters that are not of linear layers (target_parameters)",
    "lora_bias": "biases (lora_bias)",
}


def read_adapter(name: str, source: str, root: Path | None = None) -> Adapter:
    """Reads an adapter from a directory, or from the hub.

    Args:
        name: by which requests will choose it.
        source: a directory, or a hub id.
        root: where its files must lie, links followed; None for anywhere.

    Raises:
        ModelLoadError: it is missing or broken, or has a part that cannot be applied. The message
            is one line and names the adapter.
    """
    with _named(name):
        config_text, weights = _read_files(source, root)
        config = _parse_config(config_text)
        _check_config(config)
        tensors = _parse_weights(partial(load_safetensors, weights))
        return Adapter(
            name=name,
            digest=hashlib.sha256(hashlib.sha256(config_text).digest() + weights).digest(),
            updates=_updates(config, tensors),
        )


def describe_adapter(name: str, source: str) -> Adapter:
    """An adapter whose updates have shapes and no values, from its files' heads.

    Args:
        name: by which requests will choose it.
        source: a directory, or a hub id.

    Returns:
        It, without a digest.

    Raises:
        ModelLoadError: what these show is missing or broken, or cannot be applied. The message is
            one line and names the adapter.
    """
    with _named(name):
        config_path, weights_path = _paths(source, None)
        config = _parse_config(_read(config_path, _MAX_CONFIG_BYTES))
        _check_config(config)
        _read(weights_path, _MAX_WEIGHTS_BYTES, len(POINTER))
        tensors = _parse_weights(partial(_shapes, weights_path))
        return Adapter(name=name, digest=b"", updates=_updates(config, tensors))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what is wrong with an adapter into the error of a model that cannot be served."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise ModelLoadError(f"adapter {name}: {first_line(error)}") from error


def _read_files(source: str, root: Path | None) -> tuple[bytes, bytes]:
    """The configuration and the weights.

    Raises:
        ValueError: the directory lacks one, or one is too large or elsewhere.
        OSError: a file cannot be read, or is not on the hub.
    """
    limits = (_MAX_CONFIG_BYTES, _MAX_WEIGHTS_BYTES)
    config, weights = map(_read, _paths(source, root), limits)
    return config, weights


def _paths(source: str, root: Path | None) -> list[Path]:
    """Where the configuration and the weights are.

    Raises:
        ValueError: the directory lacks one, or one is elsewhere.
        OSError: a file is not on the hub.
    """
    # A shell leaves `~` after `=` as it is. Path.expanduser fails where there is no such user.
    directory = Path(os.path.expanduser(source))  # noqa: PTH111
    if directory.is_dir():
        return _files_of(directory, root)
    if directory.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ValueError(f"there is no directory {source}")
    return [Path(str(cached_file(source, file))) for file in (CONFIG_NAME, WEIGHTS_NAME)]


def _files_of(directory: Path, root: Path | None) -> list[Path]:
    """Where both files are, links followed.

    Raises:
        ValueError: one is not there, or elsewhere.
    """
    _check_directory(directory)
    paths = [(directory / file).resolve() for file in (CONFIG_NAME, WEIGHTS_NAME)]
    if root is not None and not all(path.is_relative_to(root.resolve()) for path in paths):
        raise ValueError("a file of it is a link to somewhere else")
    return paths


def _read(path: Path, max_bytes: int, num_bytes: int | None = None) -> bytes:
    """What is in a file, or in so many bytes at its beginning.

    Raises:
        ValueError: it is too large, or a pointer to a file that was not fetched.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{path.name} has {size} bytes, more than {max_bytes}")
        content = file.read(size if num_bytes is None else num_bytes)
    if content.startswith(POINTER):
        what = "a pointer of git-lfs and not the file itself"
        raise ValueError(f"{path.name} is {what}; `git lfs pull` fetches it")
    return content


def _check_directory(directory: Path) -> None:
    """Checks that both files are there.

    Raises:
        ValueError: one is not.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise ValueError(f"{directory} has no {CONFIG_NAME}, so it is not an adapter of PEFT")
    if (directory / WEIGHTS_NAME).is_file():
        return
    if (directory / _PICKLE_NAME).is_file():
        raise ValueError(
            f"{directory} has only {_PICKLE_NAME}, a format that can run code: save it as "
            "safetensors"
        )
    if any(directory.glob(_SHARDS)):
        raise ValueError(
            f"the weights in {directory} are in shards, and {WEIGHTS_NAME} is missing: save it as "
            "one file"
        )
    raise ValueError(f"{directory} has no {WEIGHTS_NAME}")


def _parse_config(text: bytes) -> dict[str, Any]:
    """The settings in the configuration.

    Raises:
        ValueError: it is not one.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_NAME} is not an object")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{CONFIG_NAME}: {name} is not an object")
        if len(pattern) > _MAX_KEYS or max(map(len, pattern), default=0) > _MAX_KEY:
            limits = f"more than {_MAX_KEYS} keys, or one longer than {_MAX_KEY}"
            raise ValueError(f"{CONFIG_NAME}: {name} has {limits}")
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name, 8)):  # PEFT's default of both
            raise ValueError(f"{CONFIG_NAME}: {name} is not a number above 0")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"{CONFIG_NAME}: use_rslora is neither true nor false")
    return config


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _check_config(config: Mapping[str, Any]) -> None:
    """Checks that everything that a configuration asks for can be applied.

    Raises:
        ValueError: it asks for something else.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"its peft_type is {kind}; only LORA is applied")
    if config.get("bias", "none") != "none":
        raise ValueError(f"it has biases (bias={config['bias']}), which are not applied")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise ValueError(
            f"it was started with init_lora_weights={start}, which changes the weights of the base "
            "model; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    known = _OF_TRAINING | _OF_TARGETS | _APPLIED | {"bias", "init_lora_weights"}
    for name, value in config.items():
        if name not in known and value:
            raise ValueError(f"it has {_NAMES.get(name, name)}, which is not applied")


def _shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a file without their values."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            part = file.get_slice(name)
            shape = part.get_shape()
            like = part[:0] if shape else file.get_tensor(name)
            tensors[name] = like.new_empty(shape, device="meta")
    return tensors


def _parse_weights(read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by their names, without the prefix that all have.

    Raises:
        ValueError: the file is broken, or not an adapter's.
    """
    try:
        tensors = read()
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{WEIGHTS_NAME} is broken: {error}") from error
    if not tensors:
        raise ValueError(f"{WEIGHTS_NAME} has no tensors")
    for name in tensors:
        if not name.startswith(_PREFIX):
            raise ValueError(f"{WEIGHTS_NAME}: {name} does not begin with {_PREFIX}")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
    """The update of each layer.

    Raises:
        ValueError: a tensor is of no update, or does not fit the configuration.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _WEIGHT.fullmatch(name)) is None:
            raise ValueError(f"{_kind_of(name)} ({name}) is not applied")
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    deadline = time.thread_time() + _PATTERN_S * (1 + len(parts) / 100)
    return {
        layer: _update(config, layer, found, deadline) for layer, found in sorted(parts.items())
    }


def _kind_of(name: str) -> str:
    """What a tensor is that is not a weight of an update."""
    if "lora_embedding" in name:
        return "an update of an embedding"
    if "lora_magnitude_vector" in name:
        return "DoRA"
    if name.endswith(".bias"):
        return "a bias"
    return "a whole layer (modules_to_save)" if "lora_" not in name else "a tensor"


def _update(
    config: Mapping[str, Any], layer: str, parts: Mapping[str, Tensor], deadline: float
) -> LowRankUpdate:
    """The update of a layer from its two matrices.

    Raises:
        ValueError: one is missing, or they do not fit each other or the configuration.
    """
    for part in "AB":
        if part not in parts:
            raise ValueError(f"{layer} has no lora_{part}")
        _check_matrix(f"{layer}.lora_{part}", parts[part])
    down, up = parts["A"].float(), parts["B"].float()
    rank = _of_layer(config.get("rank_pattern"), layer, config.get("r", 8), deadline)
    if not _is_positive(rank):
        raise ValueError(f"the rank of {layer} is not a number above 0")
    if down.shape[0] != rank or up.shape[1] != rank:
        raise ValueError(
            f"{layer} has lora_A {[*down.shape]} and lora_B {[*up.shape]}, but its rank is {rank}"
        )
    alpha = _of_layer(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8), deadline)
    if not _is_positive(alpha):
        raise ValueError(f"the alpha of {layer} is not a number above 0")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankUpdate(down, up * scale)


def _check_matrix(name: str, tensor: Tensor) -> None:
    """Checks one of the two matrices.

    Raises:
        ValueError: it is not a matrix of finite numbers.
    """
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, not a matrix of floats")
    if not tensor.is_meta and not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{name} has values that are not finite")


def _of_layer(pattern: Mapping[str, Any] | None, layer: str, default: Any, deadline: float) -> Any:
    """What a pattern says of a layer: the first key that its name ends with, as in PEFT.

    Raises:
        ValueError: a key is not a regular expression, or takes too long.
    """
    for key, value in (pattern or {}).items():
        if _names(key, layer, deadline):
            return value
    return default


def _names(key: str, layer: str, deadline: float) -> bool:
    """Whether a layer's name ends with a key, before this thread has had its processor time.

    The library's own limit counts the time of all threads of the process, which may compute steps.

    Raises:
        ValueError: the key is not a regular expression, or takes too long.
    """
    while (left_s := deadline - time.thread_time()) > 0:
        try:
            match = regex.match(rf"(.*\.)?({key})$", layer, timeout=left_s, concurrent=True)
        except regex.error as error:
            raise ValueError(f"{CONFIG_NAME}: {key} is no regular expression: {error}") from error
        except TimeoutError:
            continue
        return match is not None
    raise ValueError(f"{CONFIG_NAME}: {key} takes too long to match")
