"""Writes a Llama's weights as a GGUF file, llama.cpp's format (version 3).

The layout, from ggml's docs/gguf.md: a header, key-value pairs, the tensors' names and shapes, and
their data, each part aligned to 32 bytes. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALARS = {_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}
_NORMAL_TOKEN, _UNKNOWN_TOKEN, _CONTROL_TOKEN = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Format:
    """What the tensors of a file consist of.

    Attributes:
        file: what the file says that it has.
        matrix: of the layers' weights.
        outer: of the embeddings and the output layer, which 4 bits suit badly. Norms are float32.
    """

    file: LlamaFileType
    matrix: GGMLQuantizationType
    outer: GGMLQuantizationType


_TYPES, _FILES = GGMLQuantizationType, LlamaFileType
F32 = Format(_FILES.ALL_F32, _TYPES.F32, _TYPES.F32)
F16 = Format(_FILES.MOSTLY_F16, _TYPES.F16, _TYPES.F16)
BF16 = Format(_FILES.MOSTLY_BF16, _TYPES.BF16, _TYPES.BF16)
Q8_0 = Format(_FILES.MOSTLY_Q8_0, _TYPES.Q8_0, _TYPES.Q8_0)
Q4_0 = Format(_FILES.MOSTLY_Q4_0, _TYPES.Q4_0, _TYPES.Q8_0)

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(model: Any, path: Path, form: Format = F32) -> None:
    """Writes a `LlamaForCausalLM` with a vocabulary in which token i is the word `wi`."""
    tensors = {name: _encoded(name, array, form) for name, array in _tensors(model)}
    with path.open("wb") as file:
        metadata = _metadata(model.config, form)
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, (kind, value) in metadata.items():
            file.write(_string(key) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name, (shape, kind, array) in tensors.items():
            sizes = shape[::-1]  # the innermost dimension comes first
            file.write(_string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            file.write(struct.pack("<IQ", kind, offset))
            offset += _padded(array.nbytes)
        _align(file)
        for _, _, array in tensors.values():
            array.tofile(file)
            _align(file)


def _encoded(
    name: str, array: np.ndarray, form: Format
) -> tuple[tuple[int, ...], GGMLQuantizationType, np.ndarray]:
    """A tensor's shape, its type in the file, and its data."""
    kind = form.outer if name in _NAMES.values() else form.matrix
    if array.ndim < 2:
        kind = _TYPES.F32
    return array.shape, kind, quantize(array, kind)


def _metadata(config: Any, form: Format) -> dict[str, tuple[int, Any]]:
    """The keys that llama.cpp needs for a Llama: (type, value) of each."""
    words = [f"w{index}" for index in range(config.vocab_size)]
    kinds = [_UNKNOWN_TOKEN, _CONTROL_TOKEN] + [_NORMAL_TOKEN] * (len(words) - 2)
    return {
        "general.architecture": (_STRING, "llama"),
        "general.name": (_STRING, "random"),
        "general.alignment": (_UINT32, _ALIGNMENT),
        "general.file_type": (_UINT32, int(form.file)),
        "llama.vocab_size": (_UINT32, config.vocab_size),
        "llama.context_length": (_UINT32, config.max_position_embeddings),
        "llama.embedding_length": (_UINT32, config.hidden_size),
        "llama.block_count": (_UINT32, config.num_hidden_layers),
        "llama.feed_forward_length": (_UINT32, config.intermediate_size),
        "llama.attention.head_count": (_UINT32, config.num_attention_heads),
        "llama.attention.head_count_kv": (_UINT32, config.num_key_value_heads),
        "llama.attention.layer_norm_rms_epsilon": (_FLOAT32, config.rms_norm_eps),
        "llama.rope.dimension_count": (_UINT32, config.head_dim),
        "llama.rope.freq_base": (_FLOAT32, config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": (_STRING, "gpt2"),  # OpenVINO reads no other kind
        "tokenizer.ggml.pre": (_STRING, "smollm"),
        "tokenizer.ggml.tokens": (_ARRAY, (_STRING, words)),
        "tokenizer.ggml.token_type": (_ARRAY, (_INT32, kinds)),
        "tokenizer.ggml.merges": (_ARRAY, (_STRING, ["w 0"])),
        "tokenizer.ggml.unknown_token_id": (_UINT32, 0),
        "tokenizer.ggml.bos_token_id": (_UINT32, 1),
        "tokenizer.ggml.eos_token_id": (_UINT32, 0),
        "tokenizer.ggml.add_bos_token": (_BOOL, False),
        "tokenizer.ggml.add_eos_token": (_BOOL, False),
    }


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all tensors, as llama.cpp expects them."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name in _NAMES:
            yield _NAMES[name], _array(tensor)
            continue
        number, part = name.removeprefix("model.layers.").split(".", 1)
        part = part.removesuffix(".weight")
        if part == "self_attn.q_proj":
            tensor = _interleaved(tensor, config.num_attention_heads)
        elif part == "self_attn.k_proj":
            tensor = _interleaved(tensor, config.num_key_value_heads)
        yield f"blk.{number}.{_LAYER_NAMES[part]}.weight", _array(tensor)


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders the rows of each head [num_heads * head_dim, in_features].

    The rotary embedding of llama.cpp rotates pairs of neighbouring rows, that of transformers pairs
    of rows from the two halves of a head.
    """
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().contiguous().numpy()
    return array


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    if kind == _ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, x) for x in values)
    return struct.pack(_SCALARS[kind], value)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
