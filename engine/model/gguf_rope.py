"""The scaling of the rotary embedding that a GGUF file has, which transformers does not read.

llama.cpp keeps it in two forms: a type with a factor in the metadata, and a tensor by which the
frequencies are divided, as for Llama 3.1 and its successors. Without it texts differ at once, or
beyond the length that the model was first trained for.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch
from torch import nn

from ..protocol.config import EngineConfig

_DIVISORS = "rope_freqs.weight"
_BY_LENGTH = "rope_factors_long.weight"  # and short: other divisors for long texts
_NAMES = {  # of transformers, by the end of llama.cpp's
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_NEEDED = {"linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}
_IGNORED = frozenset({"type", "finetuned"})


def scale_configuration(config: EngineConfig, model_config: Any) -> None:
    """Puts the scaling in a file's metadata into the configuration that transformers made of it.

    Raises:
        ValueError: it is of a kind that cannot be expressed there.
    """
    reader = gguf.GGUFReader(config.model_id)
    if any(tensor.name == _BY_LENGTH for tensor in reader.tensors):
        raise ValueError(_refusal(_BY_LENGTH))
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}.rope.scaling."
    found = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    parameters = getattr(model_config, "rope_parameters", None)
    kind = found.get("type", "none")
    if kind == "none" or (parameters or {}).get("rope_type", "default") != "default":
        return
    if unknown := found.keys() - _NAMES.keys() - _IGNORED:
        raise ValueError(_refusal(f"{prefix}{min(unknown)}"))
    values = {_NAMES[name]: value for name, value in found.items() if name in _NAMES}
    if parameters is None or not _NEEDED.get(kind, {""}) <= values.keys():
        raise ValueError(_refusal(f"{prefix}type {kind!r}"))
    used = values if kind == "yarn" else {"factor": values["factor"]}
    model_config.rope_parameters = parameters | used | {"rope_type": kind}


def scale_frequencies(config: EngineConfig, model: nn.Module) -> None:
    """Divides the frequencies of a model's rotary embedding by the file's tensor, if it has one.

    Raises:
        ValueError: it does not fit the model.
    """
    tensors = gguf.GGUFReader(config.model_id).tensors
    found = next((tensor for tensor in tensors if tensor.name == _DIVISORS), None)
    if found is None:
        return
    divisors = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "original_inv_freq")]
    if not layers or any(layer.inv_freq.shape != divisors.shape for layer in layers):
        raise ValueError(_refusal(_DIVISORS))
    for layer in layers:
        layer.inv_freq /= divisors.to(layer.inv_freq.device)
        layer.original_inv_freq = layer.inv_freq.clone()


def _refusal(name: str) -> str:
    return (
        f"it scales the rotary embedding ({name}) in a way that is not read from GGUF files. Load "
        "the checkpoint that the file was made of, in safetensors"
    )
