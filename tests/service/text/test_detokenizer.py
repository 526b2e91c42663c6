"""Text, token by token: nothing is lost, nothing is torn, nothing takes longer and longer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.text.detokenizer import Detokenizer
from tests.service.fakes import demo_ids, demo_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=80)


def decode(ids: Sequence[int]) -> str:
    return demo_tokenizer().decode(ids)


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(prompt=TEXTS, text=TEXTS)
def test_the_parts_make_the_whole(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode, demo_ids(prompt))
    parts = [detokenizer.push(token_id) for token_id in demo_ids(text)]
    assert "".join(parts) == text
    assert not any(part.endswith(REPLACEMENT) for part in parts)


@given(prompt=TEXTS, text=TEXTS)
def test_single_bytes_make_the_whole_too(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode_bytes, list(prompt.encode()))
    parts = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert all(len(part) <= 1 for part in parts)


@given(st.lists(st.integers(0, 255), max_size=120))
def test_any_bytes_come_out_complete_but_for_the_last_few(raw: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    text = "".join(detokenizer.push(byte) for byte in [*raw, *b"end of it."])
    assert text.endswith("end of it.")


@given(st.lists(st.integers(0x80, 0xFF), min_size=64, max_size=200))
def test_broken_bytes_do_not_hold_the_text_back_for_ever(raw: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    waited = 0
    for byte in raw:
        waited = 0 if detokenizer.push(byte) else waited + 1
        assert waited < 32


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    assert [detokenizer.push(byte) for byte in "😀!".encode()] == ["", "", "", "😀", "!"]


def test_the_prompt_gives_context_and_is_not_repeated() -> None:
    """As tokenizers do that drop the space in front of the first word."""
    words = ["", "Once", " upon", " a", " time"]

    def joined(ids: Sequence[int]) -> str:
        return "".join(words[index] for index in ids).removeprefix(" ")

    detokenizer = Detokenizer(joined, [1, 2])
    assert [detokenizer.push(index) for index in (3, 4)] == [" a", " time"]
    assert Detokenizer(joined, []).push(3) == "a"


class Ruler:
    """Remembers how many tokens were decoded at once."""

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return decode_bytes([byte for byte in ids if byte])  # 0 is a token without any text


@pytest.mark.parametrize("byte", [ord("x"), 0x80, 0xF0])
def test_a_token_costs_the_same_early_and_late(byte: int) -> None:
    ruler = Ruler()
    detokenizer = Detokenizer(ruler, [ord("p")] * 10_000)
    for _ in range(2000):
        detokenizer.push(byte)
    assert ruler.longest <= 40


def test_tokens_without_text_cost_the_same_early_and_late() -> None:
    ruler = Ruler()
    detokenizer = Detokenizer(ruler, [])
    for _ in range(500):
        detokenizer.push(0)
    assert ruler.longest <= 40
    assert detokenizer.push(ord("x")) == "x"
