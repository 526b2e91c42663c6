"""Directories without a tokenizer.json, of which transformers makes one from other files."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import sentencepiece

from service.checkpoint.tokenizer_files import last_ordinary_id
from service.text.tokenizer import TextTokenizer
from tests.paths import REPOSITORY

TEXT = "Tokenwire serves a model over gRPC. Grüße, 日本 😀!"


def make_sentencepiece(path: Path) -> None:
    """A vocabulary of the README's English, with bytes for everything else."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPOSITORY / "README.md"),
        model_prefix=str(path / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()


def make_tekken(path: Path) -> None:
    """Bytes and one pair of them, as Mistral's files have them."""
    words = [bytes([byte]) for byte in range(256)] + [b"Gr"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    special = [
        {"rank": rank, "token_str": text, "is_control": True}
        for rank, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + len(special),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    content = {"config": config, "vocab": vocabulary, "special_tokens": special}
    (path / "tekken.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("make", "model_type"), [(make_sentencepiece, "llama"), (make_tekken, "mistral")]
)
def test_a_text_comes_back_as_it_is(tmp_path: Path, make: object, model_type: str) -> None:
    assert callable(make)
    make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert last_ordinary_id(tmp_path) is None
    tokenizer = TextTokenizer.load(str(tmp_path))
    ids = tokenizer.encode_now(TEXT, None, 1000)
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids).removeprefix("<s>").strip() == TEXT
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.model", b"no model"), ("tekken.json", b"{}")]
)
def test_what_none_can_be_made_of_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot load the tokenizer of") as caught:
        TextTokenizer.load(str(tmp_path))
    start = f"it has no tokenizer.json, and transformers makes none of {name}: "
    assert start in str(caught.value)
    assert "\n" not in str(caught.value)
