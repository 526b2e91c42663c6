"""The tokenizer of a GGUF file, held against the one that transformers makes of it with torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping

from service.text.tokenizer import TextTokenizer
from tests.gguf_models import write_gguf
from tests.service.fakes import demo_ids, demo_tokenizer

# A vocabulary of SentencePiece's kind: bytes, letters and two words that are made of them.
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = ["\u2581", "a", "b", "c", "ab", "\u2581ab", "abc"]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *_BYTES, *_WORDS],
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(_WORDS))],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(_WORDS),
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
TEXTS = ["abc ab", " a  b\n", "Grüße 日本 😀", "It's 12,345 <|end|>", ""]


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [({}, None), ({"tokenizer.ggml.pre": "llama-bpe"}, None), (SENTENCEPIECE, 266)],
    ids=["byte-level", "llama 3", "sentencepiece"],
)
def test_it_is_the_one_of_transformers(
    tmp_path: Path, vocabulary: dict[str, Any], rows: int | None
) -> None:
    path = write_gguf(tmp_path / "model.gguf", vocabulary=vocabulary, embedding_rows=rows)
    ours = TextTokenizer.load(str(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert json.loads(ours.to_json()) == json.loads(theirs.backend_tokenizer.to_str())
    for text in TEXTS:
        assert list(ours.encode_now(text, None, 1000)) == theirs.encode(text)
    assert ours.chat_template == (theirs.chat_template or "")
    assert ours.eos_token_ids == {theirs.eos_token_id}
    assert ours.special_ids >= set(theirs.all_special_ids)


def test_it_has_the_chat_template_of_the_model(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(str(write_gguf(tmp_path / "model.gguf")))
    messages = [{"role": "user", "content": "Hello!"}]
    assert tokenizer.render_chat(messages) == demo_tokenizer().render_chat(messages)


def test_named_templates_are_found(tmp_path: Path) -> None:
    named = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools | tojson }}",
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    tokenizer = TextTokenizer.load(str(write_gguf(tmp_path / "model.gguf", vocabulary=named)))
    assert tokenizer.template_takes_tools
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "Hi"


def test_the_end_of_a_turn_ends_a_text_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", vocabulary={"tokenizer.ggml.eot_token_id": 7})
    assert TextTokenizer.load(str(path)).eos_token_ids == demo_tokenizer().eos_token_ids | {7}


def test_a_kind_that_is_not_known_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", vocabulary={"tokenizer.ggml.model": "bert"})
    with pytest.raises(ValueError, match=f"^cannot load the tokenizer of {path}: .*'bert'[^\n]*$"):
        TextTokenizer.load(str(path))


def test_it_needs_no_torch(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from service.text.tokenizer import TextTokenizer\n"
        "print(TextTokenizer.load(sys.argv[1]).encode_now('Hello', None, 10))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tuple(demo_ids("Hello")))


def test_a_transformers_that_reads_files_otherwise_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.delattr(gguf_tokenizer_mapping, "convert_gguf_tokenizer")
    with pytest.raises(ValueError, match=r"transformers \S+ does not read all .* a newer one$"):
        TextTokenizer.load(str(path))
