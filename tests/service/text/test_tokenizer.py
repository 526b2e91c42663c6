"""The model's tokenizer: its files, its special tokens, and the byte offsets of tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from service.text.tokenizer import TextTokenizer
from tests.service.fakes import MODEL, demo_ids, demo_tokenizer, raw_tokenizer

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory without weights."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        shutil.copy(MODEL / name, tmp_path)
    return tmp_path


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load the tokenizer of") as failed:
        TextTokenizer.load(str(tmp_path))
    assert "\n" not in str(failed.value)


def test_a_broken_tokenizer_is_named(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer of"):
        TextTokenizer.load(str(model))


def eos_ids(model: Path, eos: object) -> frozenset[int]:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return TextTokenizer.load(str(model)).eos_token_ids


def test_eos_tokens_come_from_generation_config_and_tokenizer(model: Path) -> None:
    own = demo_tokenizer().eos_token_ids
    assert len(own) == 1
    assert eos_ids(model, [7, 9]) == {7, 9}  # a list replaces the tokenizer's
    assert eos_ids(model, 9) == {9} | own
    assert eos_ids(model, None) == own
    (model / "generation_config.json").unlink()
    assert TextTokenizer.load(str(model)).eos_token_ids == own


def test_ends_that_the_model_lacks_are_left_out(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 4000, 4097]}))
    tokenizer = TextTokenizer.load(str(model))
    tokenizer.fit(4000)
    assert tokenizer.eos_token_ids == {7}


@pytest.mark.parametrize(("vocab_size", "lacking"), [(4095, 1), (300, 3796)])
def test_tokens_that_the_model_lacks_are_told(
    model: Path, caplog: pytest.LogCaptureFixture, vocab_size: int, lacking: int
) -> None:
    TextTokenizer.load(str(model)).fit(4096)
    assert not caplog.records
    TextTokenizer.load(str(model)).fit(vocab_size)
    assert f"lacks {lacking} of the tokenizer's, from {vocab_size} on" in caplog.text


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer does not belong to this model"):
        TextTokenizer.load(str(model)).fit(2)


def test_a_tokenizer_that_puts_an_unknown_token_around_every_text_is_refused(model: Path) -> None:
    raw = raw_tokenizer()
    late = Tokenizer.from_str(raw.to_str())
    late.post_processor = processors.TemplateProcessing(
        single="<late> $A", special_tokens=[("<late>", 4096)]
    )
    late.save(str(model / "tokenizer.json"))
    TextTokenizer.load(str(model)).fit(4097)
    with pytest.raises(ValueError, match="the tokenizer does not belong to this model"):
        TextTokenizer.load(str(model)).fit(4096)


def test_eos_tokens_are_special() -> None:
    assert demo_tokenizer().eos_token_ids <= demo_tokenizer().special_ids


@given(TEXTS)
async def test_decoding_undoes_encoding(text: str) -> None:
    ids = await demo_tokenizer().encode(text)
    num_special = len(ids) - len(demo_ids(text))
    assert demo_tokenizer().decode(ids[num_special:]) == text


async def test_a_prompt_that_begins_with_bos_does_not_get_a_second_one() -> None:
    first = (await demo_tokenizer().encode("x"))[0]
    assert first in demo_tokenizer().special_ids
    ids = await demo_tokenizer().encode(demo_tokenizer().token_text(first) + "x")
    assert ids == await demo_tokenizer().encode("x")


@given(TEXTS)
async def test_spans_are_in_the_text_and_in_order(text: str) -> None:
    raw = text.encode()
    spans = await demo_tokenizer().spans(text)
    assert [span.token_id for span in spans] == list(await demo_tokenizer().encode(text))
    end = 0
    for span in spans:
        assert raw[span.start : span.stop].decode() == span.text
        assert span.stop >= end
        end = span.stop
    assert end == len(raw)


def bytes_of_letters() -> dict[str, int]:
    """GPT-2's table of the printable letters that byte-level vocabularies write bytes as."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


LETTERS = bytes_of_letters()


def token_bytes(token_id: int) -> bytes:
    """The bytes of a token, often only a part of a character."""
    word = raw_tokenizer().id_to_token(token_id)
    if token_id in demo_tokenizer().special_ids:
        return word.encode()
    return bytes(LETTERS[letter] for letter in word)


def is_boundary(raw: bytes, offset: int) -> bool:
    """Whether no character of a UTF-8 text reaches across an offset."""
    return offset == len(raw) or raw[offset] & 0xC0 != 0x80


# Characters of one to four bytes, joined and combined, in both directions.
PIECES = [
    *("a", " ", "\n", "\x00", "\x7f", "1", "é", "e\u0301", "\u0301", "ß", "ñ"),
    *("日本語", "中", "한국어", "ｶﾞ", "、"),
    *("שלום", "مرحبا", "\u200f", "\u202e", "עִבְרִית"),
    *("🙂", "👨\u200d👩\u200d👧\u200d👦", "👩🏽\u200d💻", "🇪🇸", "❤️", "1️⃣", "🏴\U000e0067\U000e007f"),
    *("नमस्ते", "ไทย", "Z͑ͫ̓", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "<|end|>"),
]
MIXED = st.lists(st.sampled_from(PIECES) | TEXTS, max_size=12).map("".join)


@given(MIXED)
async def test_spans_are_exact_byte_offsets(text: str) -> None:
    """Each span covers its token's bytes, widened to whole characters, and none is missing."""
    raw = text.encode()
    first, *spans = await demo_tokenizer().spans(text)
    assert (first.text, first.start, first.stop) == ("", 0, 0)  # the beginning-of-text token
    start, whole = 0, b""
    for span in spans:
        stop = start + len(token_bytes(span.token_id))
        assert raw[start:stop] == token_bytes(span.token_id)
        assert span.start == max(i for i in range(start + 1) if is_boundary(raw, i))
        assert span.stop == min(i for i in range(stop, len(raw) + 1) if is_boundary(raw, i))
        assert span.text == raw[span.start : span.stop].decode()
        whole += raw[max(span.start, len(whole)) : span.stop]
        start = stop
    assert start == len(raw)
    assert whole == raw


def test_a_text_that_must_be_too_long_is_recognised_by_its_length() -> None:
    assert demo_tokenizer().too_long("x" * 10_000, 100)
    assert not demo_tokenizer().too_long("x" * 1000, 100)
