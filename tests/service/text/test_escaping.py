"""Special tokens that callers spell are plain text, and those that the template writes are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from service.codec.text_worker import TextWorker
from service.text.escaping import EscapedText, new_mark
from service.text.tokenizer import TextTokenizer
from tests.service.fakes import demo_tokenizer, raw_tokenizer

END, USER = "<|end|>", "<|user|>"
PIECES = st.sampled_from(["a", " ", END, USER, "<", "|end|>", "é", "\ufdd0", "<|bos|>", "5"])


def prompt(content: str, tokenizer: TextTokenizer | None = None) -> str:
    """A turn as a template makes it, whose content is plain text."""
    special = (tokenizer or demo_tokenizer()).special_tokens
    mark = new_mark()
    return special.reveal(f"{USER}{special.hide(content, mark)}{END}", mark)


def plain_ids(text: str) -> list[int]:
    """The ids of a text of which no part is special."""
    backend = Tokenizer.from_str(raw_tokenizer().to_str())
    backend.encode_special_tokens = True
    return list(backend.encode(text, add_special_tokens=False).ids)


@given(st.lists(PIECES, max_size=8).map("".join))
def test_only_what_the_template_writes_is_special(content: str) -> None:
    text = prompt(content)
    bos, user, *ids, end = demo_tokenizer().encode_now(text, None, 1000)
    assert text == f"{USER}{content}{END}"
    assert (bos, user, end) == tuple(raw_tokenizer().token_to_id(t) for t in ("<|bos|>", USER, END))
    assert ids == plain_ids(content)


@given(st.lists(PIECES, max_size=8).map("".join))
def test_tokens_cover_the_text(content: str) -> None:
    text = prompt(content)
    (spans,) = demo_tokenizer().span_slices(text, is_prompt=True)
    raw = text.encode()
    ids = demo_tokenizer().encode_now(text, None, 1000)
    assert tuple(span.token_id for span in spans) == ids
    covered = sorted({(span.start, span.stop) for span in spans})
    assert b"".join(raw[start:stop] for start, stop in covered) == raw
    assert spans[1].text == USER


def test_a_text_without_special_tokens_stays_a_text() -> None:
    assert not isinstance(prompt("hello"), EscapedText)
    assert isinstance(prompt(f"hello {END}"), EscapedText)


def test_every_text_in_a_value_is_searched_and_nothing_else_changes() -> None:
    special, mark = demo_tokenizer().special_tokens, new_mark()
    value = {END: [f"a{END}", 1, None, True, {"b": 2.5}], "role": "user"}
    hidden = special.hide(value, mark)
    assert hidden["role"] == "user"
    assert END not in str(hidden)
    assert special.reveal(str(hidden), mark) == str(value)


def test_marks_are_hidden_that_the_tokenizer_does_not_call_special() -> None:
    backend = Tokenizer.from_str(raw_tokenizer().to_str())
    backend.add_tokens(["<think>", "<｜User｜>", "  "])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>")
    tokenizer = TextTokenizer(fast, frozenset({2}))
    special, mark = tokenizer.special_tokens, new_mark()
    said = special.hide("<think>  <｜User｜>", mark, frozenset({"<think>"}))
    text = special.reveal(f"<｜User｜>{said}", mark)
    ids = tokenizer.encode_now(text, None, 100)
    thinks, user, spaces = (backend.token_to_id(x) for x in ("<think>", "<｜User｜>", "  "))
    assert ids[:4] == (0, user, thinks, spaces)
    assert user not in ids[4:]
    assert tokenizer.decode(ids[1:]) == str(text)


def test_another_process_makes_the_same_tokens() -> None:
    text = prompt(f"a {END} b")
    assert isinstance(text, EscapedText)
    request = {"do": "encode", "text": str(text), "truncate": None, "max_tokens": 100}
    sent = [list(place) for place in text.special]
    (answer,) = TextWorker(demo_tokenizer()).answer({**request, "special": sent})
    assert isinstance(answer, dict)
    ids = demo_tokenizer().encode_now(text, None, 100)
    assert answer["ids"] == b"".join(token_id.to_bytes(4, "little") for token_id in ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_piece_of_the_vocabulary_is_not_taken_for_the_token(kind: str) -> None:
    pieces = ["<unk>", "</s>", *"</s>ab"]
    if kind == "unigram":
        model = Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], unk_id=0)
    else:
        vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        model = BPE(vocab, [], unk_token="<unk>", ignore_merges=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="</s>"
    )
    tokenizer = TextTokenizer(fast, frozenset({1}))
    special, mark = tokenizer.special_tokens, new_mark()
    text = special.reveal(f"a{special.hide('</s>', mark)}b</s>", mark)
    first, *ids, before, last = tokenizer.encode_now(text, None, 100)
    assert tokenizer.decode([first]) == "a"
    assert [tokenizer.decode([token_id]) for token_id in ids] == list("</s>")
    assert (tokenizer.decode([before]), last) == ("b", 1)
