"""Text token by token: complete, in whole characters, and at a constant cost per token."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from service.text.detokenizer import Detokenizer
from service.text.tokenizer import TextTokenizer
from tests.service.fakes import demo_ids, demo_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=80)


def decode(ids: Sequence[int]) -> str:
    return demo_tokenizer().decode(ids)


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(prompt=TEXTS, text=TEXTS)
def test_parts_concatenate_to_the_whole_text(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode, demo_ids(prompt))
    parts = [detokenizer.push(token_id) for token_id in demo_ids(text)]
    assert "".join(parts) == text
    assert not any(part.endswith(REPLACEMENT) for part in parts)


@given(prompt=TEXTS, text=TEXTS)
def test_parts_of_single_byte_tokens_concatenate_to_the_whole_text(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(decode_bytes, list(prompt.encode()))
    parts = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert all(len(part) <= 1 for part in parts)


@given(st.lists(st.integers(0, 255), max_size=120))
def test_text_after_any_bytes_is_complete(raw: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    text = "".join(detokenizer.push(byte) for byte in [*raw, *b"end of it."])
    assert text.endswith("end of it.")


@given(st.lists(st.integers(0x80, 0xFF), min_size=64, max_size=200))
def test_invalid_bytes_delay_text_by_a_bounded_number_of_tokens(raw: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    waited = 0
    for byte in raw:
        waited = 0 if detokenizer.push(byte) else waited + 1
        assert waited < 32


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(decode_bytes, [])
    assert [detokenizer.push(byte) for byte in "😀!".encode()] == ["", "", "", "😀", "!"]


def decode_chunks(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are any bytes: each id holds its own."""
    return b"".join(_chunk(token_id) for token_id in ids).decode(errors="replace")


def _chunk(token_id: int) -> bytes:
    return token_id.to_bytes((token_id.bit_length() + 7) // 8).removeprefix(b"\x01")


def _ids(*chunks: bytes) -> list[int]:
    return [int.from_bytes(b"\x01" + chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("chunks", "parts"),
    [
        (("日本".encode()[:4],), ["日"]),
        ((b"a", "é😀".encode()[:3]), ["a", "é"]),
        (("ab€".encode()[:-1], "€".encode()[-1:] + "😀".encode()[:1]), ["ab", "€"]),
        (("😀".encode()[:3], "😀".encode()[3:] + b"!" + "é".encode()[:1]), ["", "😀!"]),
        ((b"x\xff", b"y"), ["x", f"{REPLACEMENT}y"]),
    ],
)
def test_a_last_token_gives_the_characters_that_are_whole(
    chunks: tuple[bytes, ...], parts: list[str]
) -> None:
    detokenizer = Detokenizer(decode_chunks, _ids(b"p"))
    assert [detokenizer.push(token_id) for token_id in _ids(*chunks)] == parts


@given(text=TEXTS, data=st.data())
def test_text_is_at_no_time_behind_by_a_whole_character(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(raw) - 1, 1)), max_size=12)))
    ends = [*(cut for cut in cuts if cut < len(raw)), len(raw)]
    starts = [0, *ends[:-1]]
    detokenizer = Detokenizer(decode_chunks, [])
    returned = ""
    for start, end in zip(starts, ends, strict=True):
        returned += detokenizer.push(*_ids(raw[start:end]))
        assert returned == raw[:end].decode(errors="ignore")


def test_the_prompt_gives_context_and_is_not_repeated() -> None:
    """As with tokenizers that drop the space before the first word."""
    words = ["", "Once", " upon", " a", " time"]

    def joined(ids: Sequence[int]) -> str:
        return "".join(words[index] for index in ids).removeprefix(" ")

    detokenizer = Detokenizer(joined, [1, 2])
    assert [detokenizer.push(index) for index in (3, 4)] == [" a", " time"]
    assert Detokenizer(joined, []).push(3) == "a"


class Ruler:
    """Records how many tokens were decoded at once."""

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return decode_bytes([byte for byte in ids if byte])  # 0 is a token without any text


@pytest.mark.parametrize("byte", [ord("x"), 0x80, 0xF0])
def test_the_cost_of_a_token_does_not_grow_with_the_text(byte: int) -> None:
    ruler = Ruler()
    detokenizer = Detokenizer(ruler, [ord("p")] * 10_000)
    for _ in range(2000):
        detokenizer.push(byte)
    assert ruler.longest <= 40


def test_the_cost_of_tokens_without_text_does_not_grow() -> None:
    ruler = Ruler()
    detokenizer = Detokenizer(ruler, [])
    for _ in range(500):
        detokenizer.push(0)
    assert ruler.longest <= 40
    assert detokenizer.push(ord("x")) == "x"


def _vocabulary_of_bytes() -> dict[str, int]:
    """One of SentencePiece's kind: pieces with marks of spaces, and a token for each byte."""
    pieces = ["<unk>", "<s>", *(f"<0x{value:02X}>" for value in range(256))]
    words = ["a", "b", "é", "日本", "▁", "▁a", "▁▁", "▁été", "ab▁", "\N{REPLACEMENT CHARACTER}b"]
    return {piece: index for index, piece in enumerate([*pieces, *words])}


def _tokenizer(decoder: decoders.Decoder | None) -> TextTokenizer:
    """A tokenizer with this decoder."""
    vocabulary = _vocabulary_of_bytes()
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if decoder is not None:
        backend.decoder = decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    return TextTokenizer(fast, frozenset())


_LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_LOCAL = {
    "bytes": demo_tokenizer,
    "SentencePiece": lambda: _tokenizer(decoders.Sequence(_LLAMA)),
    "Llama": lambda: _tokenizer(decoders.Sequence([*_LLAMA, decoders.Strip(" ", 1, 0)])),
    "Metaspace": lambda: _tokenizer(decoders.Metaspace()),
}


@pytest.mark.parametrize("name", _LOCAL)
def test_texts_that_are_looked_up_are_those_that_are_decoded(name: str) -> None:
    tokenizer = _LOCAL[name]()
    text_after = tokenizer.text_after
    assert text_after is not None
    rng = random.Random(5)
    num_ids = 4096 if name == "bytes" else len(_vocabulary_of_bytes()) + 1  # one is unknown
    pieces = range(258, num_ids) if name != "bytes" else range(num_ids)
    for _ in range(150):
        chosen = rng.choices([range(num_ids), pieces], k=40)
        ids = [rng.choice(among) for among in chosen]
        num_prompt = rng.randrange(6)
        looked_up = Detokenizer(tokenizer.decode, ids[:num_prompt], text_after)
        decoded = Detokenizer(tokenizer.decode, ids[:num_prompt])
        for token_id in ids[num_prompt:]:
            assert looked_up.push(token_id) == decoded.push(token_id)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Strip(" ", 0, 1),
    ],
    ids=["none", "WordPiece", "replaces after joining", "strips the end"],
)
def test_nothing_is_looked_up_where_tokens_change_the_text_before(
    decoder: decoders.Decoder | None,
) -> None:
    assert _tokenizer(decoder).text_after is None
