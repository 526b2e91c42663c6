"""Places and likeliest tokens of scored texts."""

from __future__ import annotations

from service.generation.generation import PrefillToken, Token
from service.openai.completion_logprobs import ScoredToken, of_generation
from tests.service.fakes import WordTokenizer, generation, generation_request

WORDS = WordTokenizer("<bos>", "Once", " upon", " a", " time", "<eos>")
BOS, ONCE, UPON, A, TIME, EOS = range(6)


def token(token_id: int, logprob: float | None = -0.5) -> Token:
    text = WORDS.words[token_id]
    return Token(token_id, text, logprob, text.startswith("<"))


def scored(inputs: str, prompt_ids: list[int], *, top_n: int = 1) -> list[ScoredToken]:
    prefill = [
        PrefillToken(
            item, WORDS.words[item], -1.0 if index else None, (token(A, -0.1),) * min(index, 1)
        )
        for index, item in enumerate(prompt_ids)
    ]
    result = generation(
        request=generation_request(inputs=inputs, prompt_token_ids=tuple(prompt_ids)),
        prefill=prefill,
        tokens=[token(A), token(EOS), token(TIME)],
        top_tokens=[[token(A), token(TIME)], [token(TIME, -0.2), token(A)], [token(TIME)]],
    )
    return of_generation(result, WORDS.decode, echo=True, top_n=top_n)


def test_special_token_before_a_text_has_no_place_in_it() -> None:
    found = scored("Once upon", [BOS, ONCE, UPON])
    assert [item.offset for item in found] == [0, 0, 4, 9, 11, 11]
    assert [item.text for item in found][:3] == ["<bos>", "Once", " upon"]


def test_special_token_that_the_text_spells_has_its_place() -> None:
    assert [item.offset for item in scored("<bos>Once", [BOS, ONCE])][:3] == [0, 5, 9]


def test_first_token_has_neither_logprob_nor_others() -> None:
    first, second, *_ = scored("Once upon", [ONCE, UPON])
    assert (first.logprob, first.tops) == (None, None)
    assert second.tops == {" a": -0.1, " upon": -1.0}


def test_token_itself_is_added_if_it_is_not_among_the_likeliest() -> None:
    *_, a, eos, time = scored("Once", [ONCE])
    assert a.tops == {" a": -0.5}
    assert eos.tops == {" time": -0.2, "<eos>": -0.5}
    assert time.tops == {" time": -0.5}


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    twins = [Token(7, "�", -0.1, False), Token(8, "�", -3.0, False)]
    found = ScoredToken.of(Token(9, "�", -4.0, False), twins, 0, 2)
    assert found.tops == {"�": -0.1}
