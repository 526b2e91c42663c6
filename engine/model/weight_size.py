"""How much memory a checkpoint's weights take, known from its headers before they are loaded.

A process that takes more than there is gets killed by the system, without a word of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from ..attention.kv_cache import free_memory
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from .source import is_gguf

_FLOATS = {"F64", "F32", "F16", "BF16"}  # in the headers of safetensors: what is converted
_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # the others have one


def check_room(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Checks that the weights of a directory or a GGUF file fit into the memory that is free.

    Args:
        config: says where the checkpoint is. One of the hub is not checked.
        dtype: what the weights are converted to.
        device: where they go.

    Raises:
        ModelLoadError: they do not fit; the message has both numbers.
    """
    needed, free = weight_bytes(config, dtype), free_memory(device)
    if needed > free:
        raise ModelLoadError(
            f"not enough memory to load {config.model_id}: its weights take {needed / 1e9:.1f} GB "
            f"in {str(dtype)[6:]}, and {free / 1e9:.1f} GB are free"
        )


def weight_bytes(config: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights once they are loaded; 0 if there are no files to read that from."""
    if is_gguf(config):
        return dtype.itemsize * _num_gguf_weights(config.model_id)
    directory = Path(config.model_id)
    whole = directory / "model.safetensors"
    parts = directory.glob("model-*-of-*.safetensors")
    return _safetensors_bytes([whole] if whole.is_file() else parts, dtype)


def _num_gguf_weights(path: str) -> int:
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)


def _safetensors_bytes(files: Iterable[Path], dtype: torch.dtype) -> int:
    """Bytes of all tensors; those that are quantised stay as they are."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                part = tensors.get_slice(name)
                kind = part.get_dtype()
                size = dtype.itemsize if kind in _FLOATS else _BYTES.get(kind, 1)
                total += math.prod(part.get_shape()) * size
    return total
