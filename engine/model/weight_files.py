"""The files of a checkpoint's weights on this machine, and whether quantised ones are complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from ..protocol.config import EngineConfig

EIGHT_BITS = {"I8", "F8_E4M3", "F8_E5M2"}  # of a weight each, in the headers of safetensors


def weight_files(config: EngineConfig) -> list[Path]:
    """The files of safetensors; of a model on the hub those that have been fetched."""
    directory = Path(config.model_id)
    if not directory.is_dir():
        found = try_to_load_from_cache(config.model_id, "config.json", revision=config.revision)
        if not isinstance(found, str):
            return []
        directory = Path(found).parent
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return [directory / name for name in sorted(names) if (directory / name).is_file()]


def tensors_of(files: Iterable[Path]) -> Iterator[tuple[str, str, list[int]]]:
    """The name, the format and the shape of each tensor, from headers alone."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def check_scales(config: EngineConfig) -> None:
    """Checks that weights of 8 bits have scales: transformers would take them for the weights.

    Raises:
        ValueError: one has none; the text names it.
    """
    formats = {name: kind for name, kind, _ in tensors_of(weight_files(config))}
    for name, kind in sorted(formats.items()):
        is_weight = kind in EIGHT_BITS and name.endswith(".weight")
        if is_weight and not {f"{name}_scale", f"{name}_scale_inv"} & formats.keys():
            raise ValueError(f"{name} is quantised, and the checkpoint lacks {name}_scale")
