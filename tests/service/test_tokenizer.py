"""The model's tokenizer: what it loads from, what it adds, and where its tokens lie in a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.tokenizer import TextTokenizer

from .fakes import MODEL, demo_ids, demo_tokenizer

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


def test_what_ends_a_text(model: Path) -> None:
    own = demo_tokenizer().eos_token_ids
    assert len(own) == 1
    assert eos_ids(model, [7, 9]) == {7, 9}  # a list replaces the tokenizer's
    assert eos_ids(model, 9) == {9} | own
    assert eos_ids(model, None) == own
    (model / "generation_config.json").unlink()
    assert TextTokenizer.load(str(model)).eos_token_ids == own


def test_what_ends_a_text_is_special() -> None:
    assert demo_tokenizer().eos_token_ids <= demo_tokenizer().special_ids


@given(TEXTS)
async def test_decoding_undoes_encoding(text: str) -> None:
    ids = await demo_tokenizer().encode(text)
    num_special = len(ids) - len(demo_ids(text))
    assert demo_tokenizer().decode(ids[num_special:]) == text


async def test_a_prompt_that_has_its_first_token_does_not_get_a_second() -> None:
    first = (await demo_tokenizer().encode("x"))[0]
    assert first in demo_tokenizer().special_ids
    ids = await demo_tokenizer().encode(demo_tokenizer().token_text(first) + "x")
    assert ids == await demo_tokenizer().encode("x")


@given(TEXTS)
async def test_spans_lie_in_the_text_in_order(text: str) -> None:
    raw = text.encode()
    spans = await demo_tokenizer().spans(text)
    assert [span.token_id for span in spans] == list(await demo_tokenizer().encode(text))
    end = 0
    for span in spans:
        assert raw[span.start : span.stop].decode() == span.text
        assert span.stop >= end
        end = span.stop
    assert end == len(raw)


def test_a_text_may_be_too_long_to_fit() -> None:
    assert demo_tokenizer().too_long("x" * 10_000, 100)
    assert not demo_tokenizer().too_long("x" * 1000, 100)
