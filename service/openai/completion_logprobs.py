"""Log-probabilities of completions, token by token, with each token's place in the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..generation.generation import Generation, PrefillToken, Token
from ..text.detokenizer import Decode, Detokenizer


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token of the prompt or of its continuation.

    Attributes:
        text: the token's.
        logprob: None if it is no finite number, and for the first token of a prompt.
        tops: the likeliest tokens at its place with their log-probabilities, in their order, and
            the token itself; None for the first token of a prompt.
        offset: where it begins in the choice's text, in characters.
    """

    text: str
    logprob: float | None
    tops: dict[str, float | None] | None
    offset: int

    @classmethod
    def of(cls, token: Token, top_tokens: Sequence[Token], offset: int, top_n: int) -> ScoredToken:
        """A generated token. Of `top_tokens`, which may have more that tie, the first `top_n`."""
        tops = _tops(token.id, token.text, token.logprob, tuple(top_tokens[:top_n]))
        return cls(token.text, token.logprob, tops, offset)


def of_generation(
    result: Generation, decode: Decode, *, echo: bool, top_n: int
) -> list[ScoredToken]:
    """The tokens of a continuation, with `echo` after those of its prompt."""
    prompt = result.request.inputs if echo else ""
    scored = list(_of_prompt(result.prefill, prompt, decode)) if echo else []
    offset = len(prompt)
    steps = result.top_tokens or [[] for _ in result.tokens]
    for token, top_tokens in zip(result.tokens, steps, strict=True):
        scored.append(ScoredToken.of(token, top_tokens, offset, top_n))
        offset += 0 if token.special else len(token.text)
    return scored


def _of_prompt(
    prefill: Sequence[PrefillToken], prompt: str, decode: Decode
) -> Iterable[ScoredToken]:
    detokenizer, offset = Detokenizer(decode, ()), 0
    for index, token in enumerate(prefill):
        tops = _tops(token.id, token.text, token.logprob, token.top_tokens) if index else None
        yield ScoredToken(token.text, token.logprob, tops, offset)
        # Special tokens that the tokenizer adds around a text are not in it.
        added = detokenizer.push(token.id)
        if prompt.startswith(added, offset):
            offset += len(added)


def _tops(
    token_id: int, text: str, logprob: float | None, top_tokens: Sequence[Token]
) -> dict[str, float | None]:
    """The likeliest tokens by their texts; of several with the same text, the likeliest."""
    tops: dict[str, float | None] = {}
    for top in top_tokens:
        tops.setdefault(top.text, top.logprob)
    if all(top.id != token_id for top in top_tokens):
        tops.setdefault(text, logprob)
    return tops
