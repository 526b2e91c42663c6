"""The tokenizer that a GGUF file has in its metadata."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..checkpoint.gguf import GgufFile, read_gguf

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn and a message


def load_gguf_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer of a file, and the tokens that end a text.

    transformers converts it; only reading the file, for which it needs torch, is ours.

    Raises:
        ValueError: the file has none that can be converted.
        OSError: the file cannot be read.
    """
    file = read_gguf(path)
    conversion = _conversion()
    groups = conversion.GGUF_TOKENIZER_MAPPING
    described = _described(file, groups["tokenizer"])
    architecture = file.metadata["general.architecture"]
    backend, more = conversion.convert_gguf_tokenizer(architecture, described)
    arguments = _described(file, groups["tokenizer_config"]) | _special_tokens(file) | more
    if described.get("tokenizer_type") == "llama":  # whose files need not say so
        arguments.setdefault("add_bos_token", True)
    if templates := _chat_templates(file):
        arguments["chat_template"] = templates
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, **arguments)
    ends = (_value(file, name) for name in _ENDS)
    return tokenizer, frozenset(index for index in ends if isinstance(index, int))


def _conversion() -> Any:
    """What transformers converts tokenizers by.

    Older versions have another one, which does not read how a file splits texts into words.

    Raises:
        ValueError: this version is such a one.
    """
    found = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if not hasattr(found, "convert_gguf_tokenizer"):
        raise ValueError(
            f"transformers {transformers.__version__} does not read all of a GGUF file's "
            "tokenizer: it takes a newer one"
        )
    return found


def _described(file: GgufFile, names: dict[str, str]) -> dict[str, Any]:
    """What transformers wants to know, by its names."""
    values = {name: f"tokenizer.{key}" for key, name in names.items()}
    return {name: file.metadata[key] for name, key in values.items() if key in file.metadata}


def _special_tokens(file: GgufFile) -> dict[str, str | None]:
    ids = {name: _value(file, key) for name, key in _SPECIAL.items()}
    return {name: None if index is None else file.tokens[index] for name, index in ids.items()}


def _chat_templates(file: GgufFile) -> dict[str, str]:
    """Templates by their names; empty where there is one alone, which has none."""
    default = file.metadata.get("tokenizer.chat_template")
    names = file.metadata.get("tokenizer.chat_templates")
    if not isinstance(names, list):
        return {}
    found = {name: file.metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    return {name: text for name, text in {"default": default, **found}.items() if text is not None}


def _value(file: GgufFile, key: str) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}")
