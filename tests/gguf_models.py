"""Small GGUF files with random weights and the vocabulary of the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from service.bundled import demo_model

HIDDEN, INNER, LAYERS, HEADS, VALUE_HEADS = 128, 256, 2, 4, 2
_CONTROL, _NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    path: Path,
    kind: Kind = Kind.F32,
    *,
    architecture: str = "llama",
    embedding_rows: int | None = None,
    vocabulary: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Path:
    """Writes a Llama whose linear layers are in a format.

    Args:
        path: of the file.
        kind: the format; embeddings and norms stay as they are.
        architecture: what the file says that it is.
        embedding_rows: token ids of the embedding; by default, all that the vocabulary has.
        vocabulary: metadata to add or, where a value is None, to leave out.
        tensors: to add, in float32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer)
    num_tokens = _add_vocabulary(writer, vocabulary or {})
    for name, shape in _shapes(embedding_rows or num_tokens).items():
        weights = _random(name, shape)
        if len(shape) == 1 or name == "token_embd.weight":
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
    for name, weights in (tensors or {}).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(VALUE_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_vocabulary(writer: gguf.GGUFWriter, changes: dict[str, Any]) -> int:
    """Adds the bundled model's vocabulary, with changes; returns how many tokens it has."""
    spec = json.loads((demo_model() / "tokenizer.json").read_text())
    ids = dict(spec["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    end = json.loads((demo_model() / "config.json").read_text())["eos_token_id"]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_CONTROL if t in special else _NORMAL for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end if isinstance(end, int) else end[0],
        "tokenizer.chat_template": (demo_model() / "chat_template.jinja").read_text(),
    } | changes
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    return len(tokens)


def _shapes(num_tokens: int) -> dict[str, tuple[int, ...]]:
    width = HIDDEN * VALUE_HEADS // HEADS
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (width, HIDDEN),
        "attn_v": (width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    layers = {
        f"blk.{index}.{name}.weight": shape
        for index in range(LAYERS)
        for name, shape in layer.items()
    }
    return {
        "token_embd.weight": (num_tokens, HIDDEN),
        **layers,
        "output_norm.weight": (HIDDEN,),
        "output.weight": (num_tokens, HIDDEN),
    }


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    source = np.random.default_rng(list(name.encode()))
    if len(shape) == 1:
        return (1 + 0.1 * source.standard_normal(shape)).astype(np.float32)
    return (source.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
