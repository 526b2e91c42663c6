"""Draft tokens: which ones are proposed, and that outputs are the same with and without them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import Request, SamplingParams, SequenceOutput
from engine.scheduling.prompt_lookup import Drafter
from tests.engine.fakes import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    counting_logits,
    make_engine,
    next_logits,
    run,
)

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def test_draft_tokens_are_what_followed_the_same_tokens_before() -> None:
    assert Drafter(4).propose([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1]
    assert Drafter(2).propose([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5]


def test_the_longest_and_then_the_latest_match_counts() -> None:
    assert Drafter(1).propose([1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3]) == [8]
    assert Drafter(1).propose([2, 3, 8, 2, 3, 9, 7, 2, 3]) == [9]


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4, 5]])
def test_tokens_without_an_earlier_match_give_no_drafts(tokens: list[int]) -> None:
    assert Drafter(4).propose(tokens) == []


@given(TOKENS, st.integers(1, 5), st.lists(st.integers(0, 60)))
def test_drafts_do_not_depend_on_how_many_tokens_are_added_at_a_time(
    tokens: list[int], size: int, cuts: list[int]
) -> None:
    drafter = Drafter(size)
    for cut in sorted(cuts):
        drafter.propose(tokens[:cut])
    assert drafter.propose(tokens) == Drafter(size).propose(tokens)


@given(TOKENS, st.integers(1, 5))
def test_draft_tokens_occur_in_the_text_after_the_same_two_tokens(
    tokens: list[int], size: int
) -> None:
    drafts = Drafter(size).propose(tokens)
    assert len(drafts) <= size
    if drafts:
        pattern = [*tokens[-2:], *drafts]
        ends = range(len(pattern), len(tokens) + 1)
        assert any(tokens[end - len(pattern) : end] == pattern for end in ends)


def test_the_acceptance_follows_what_was_accepted_of_what_was_tried() -> None:
    drafter = Drafter(4)
    for _ in range(20):
        drafter.report(4, 4)
    assert drafter.acceptance > 0.95
    drafter.report(4, 0)  # one was tried
    assert 0.85 < drafter.acceptance < 0.95
    for _ in range(50):
        drafter.report(4, 0)
    assert drafter.acceptance < 0.05


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8))))
def test_the_acceptance_is_a_probability(reports: list[tuple[int, int]]) -> None:
    drafter = Drafter(8)
    for num_proposed, num_accepted in reports:
        drafter.report(num_proposed, min(num_accepted, num_proposed))
        assert 0 < drafter.acceptance < 1


def requests(count: int, seed: int) -> list[Request]:
    """Requests with repetitive prompts, and with parameters of every kind."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        part = [rng.randrange(VOCAB_SIZE - 2) for _ in range(rng.randrange(1, 6))]
        sampling: dict[str, Any] = rng.choice(
            [
                {},
                {"do_sample": True, "seed": rng.getrandbits(64)},
                {"do_sample": True, "seed": 5, "temperature": 0.3, "top_k": 3},
                {"repetition_penalty": 1.3},
                {"frequency_penalty": 0.7, "top_n_tokens": 2},
            ]
        )
        made.append(
            Request(
                request_id=f"r{number}",
                prompt_token_ids=tuple(part * rng.randrange(1, 5)),
                max_new_tokens=rng.randrange(1, 30),
                sampling=SamplingParams(**sampling),
                eos_token_ids=frozenset({rng.randrange(VOCAB_SIZE)}),
                prompt_logprobs=rng.random() < 0.2,
            )
        )
    return made


def visible(outputs: dict[str, list[SequenceOutput]]) -> dict[str, list[Any]]:
    """All that a caller sees of its stream, except the times."""
    return {
        key: [
            (o.token.token_id, round(o.token.logprob, 4), len(o.token.top), o.finish_reason)
            for o in parts
            if o.token is not None
        ]
        for key, parts in outputs.items()
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_blocks", [200, 14])
@pytest.mark.parametrize("logits_of", [next_logits, counting_logits])
def test_speculation_changes_no_token(seed: int, num_blocks: int, logits_of: Any) -> None:
    todo = requests(6, seed)
    fits = [r for r in todo if len(r.prompt_token_ids) + 30 <= num_blocks * BLOCK_SIZE]
    plain = run(make_engine(num_blocks=num_blocks, logits_of=logits_of), *fits)
    drafting = make_engine(num_blocks=num_blocks, logits_of=logits_of, max_draft_tokens=4)
    assert visible(run(drafting, *fits)) == visible(plain)


def test_speculation_saves_steps_on_a_repetitive_text() -> None:
    """With a model that counts to nine and starts again."""
    request = Request(request_id="r", prompt_token_ids=tuple(range(10)) * 2, max_new_tokens=60)
    steps = {}
    for max_draft_tokens in (0, 4):
        engine = make_engine(max_draft_tokens=max_draft_tokens, logits_of=counting_logits)
        tokens = [o.token.token_id for o in run(engine, request)["r"] if o.token is not None]
        assert tokens == [number % 10 for number in range(60)]
        steps[max_draft_tokens] = engine.stats().num_steps
    assert steps[0] == 60
    assert steps[4] <= 15
