"""How much memory a checkpoint's weights take, known from its headers before they are loaded.

A process that takes more than there is gets killed by the system, without a word of its own.
"""

from __future__ import annotations

import math

import gguf
import torch

from ..attention.kv_cache import free_memory
from ..protocol.config import EngineConfig
from ..protocol.errors import ModelLoadError
from .source import is_gguf
from .weight_files import EIGHT_BITS, tensors_of, weight_files

_FLOATS = {"F64", "F32", "F16", "BF16"}  # in the headers of safetensors: what is converted
_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # the others have one
_QUANTIZED = (".weight", ".weight_packed", "_blocks")  # how the names of quantised weights end


def check_room(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, stored_bits: int | None = None
) -> None:
    """Checks that the weights of a directory or a GGUF file fit into the memory that is free.

    Args:
        config: says where the checkpoint is. One of the hub is checked once it has been fetched.
        dtype: what the weights are converted to.
        device: where they go.
        stored_bits: of quantised weights that are dequantised; None if they stay as they are.

    Raises:
        ModelLoadError: they do not fit; the message has both numbers.
    """
    needed, free = weight_bytes(config, dtype, stored_bits), free_memory(device)
    if needed > free:
        raise ModelLoadError(
            f"not enough memory to load {config.model_id}: its weights take {needed / 1e9:.1f} GB "
            f"in {str(dtype)[6:]}, and {free / 1e9:.1f} GB are free"
        )


def weight_bytes(config: EngineConfig, dtype: torch.dtype, stored_bits: int | None = None) -> int:
    """Bytes of the weights once they are loaded; 0 if there are no files to read that from."""
    if is_gguf(config):
        return dtype.itemsize * _num_gguf_weights(config.model_id)
    return sum(
        math.prod(shape) * _size(name, kind, dtype, stored_bits)
        for name, kind, shape in tensors_of(weight_files(config))
    )


def _num_gguf_weights(path: str) -> int:
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)


def _size(name: str, kind: str, dtype: torch.dtype, stored_bits: int | None) -> int:
    """Bytes in memory for a number in a file: for one that packs several weights, all of theirs."""
    if kind in _FLOATS:
        return dtype.itemsize
    stored = _BYTES.get(kind, 1)
    if stored_bits is None or not name.endswith(_QUANTIZED):
        return stored
    return dtype.itemsize * (1 if kind in EIGHT_BITS else 8 * stored // stored_bits)
