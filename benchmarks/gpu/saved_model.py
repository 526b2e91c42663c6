"""A random model of a real shape in a directory, as servers load it: made on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.random_engine import release
from benchmarks.random_model import build


def save(config: Any, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Writes weights, configuration and a tokenizer in which token i is the word `wi`."""
    model = build(config, device, dtype)
    model.save_pretrained(path)
    del model
    release(device)
    save_tokenizer(config.vocab_size, path)


def save_tokenizer(vocab_size: int, path: Path) -> None:
    """Writes the tokenizer alone."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
