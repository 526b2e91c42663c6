"""Prefixes are shared where a state is kept; a state is that of its text, whatever runs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.engine import Engine
from engine.protocol.request import Request, SequenceOutput
from engine.scheduling.sequence import Sequence
from engine.scheduling.state_blocks import copy_interval
from tests.engine.fakes import (
    BLOCK_SIZE,
    counting_logits,
    greedy_tokens,
    make_request,
    run,
    token_ids,
)
from tests.engine.recurrent.fake_states import make_state_engine

PROMPT = tuple(range(3, 25))  # five blocks of four, and two tokens


def ask(engine: Engine, prompt: tuple[int, ...], max_new_tokens: int = 3) -> list[SequenceOutput]:
    """The outputs for a prompt, whose tokens are checked."""
    outputs = run(engine, make_request("r", prompt, max_new_tokens=max_new_tokens))["r"]
    assert token_ids(outputs) == greedy_tokens(prompt, max_new_tokens)
    return outputs


def num_cached(engine: Engine, prompt: tuple[int, ...], max_new_tokens: int = 3) -> int:
    """The cached tokens of a prompt, as its first output says."""
    return ask(engine, prompt, max_new_tokens)[0].num_cached_tokens


def test_a_prompt_that_is_asked_again_is_computed_from_its_last_whole_block_on() -> None:
    engine = make_state_engine()
    assert num_cached(engine, PROMPT) == 0
    assert num_cached(engine, PROMPT) == 20
    assert num_cached(engine, PROMPT[:20]) == 0, "its last token is to be computed"
    assert num_cached(engine, (*PROMPT, 1, 2, 3)) == 20
    assert engine.stats().num_cached_tokens == 40


def test_a_beginning_of_which_two_texts_went_on_otherwise_is_shared_by_the_third() -> None:
    engine = make_state_engine()
    beginning = PROMPT[:12]
    assert num_cached(engine, (*beginning, *range(20, 29))) == 0
    assert num_cached(engine, (*beginning, 3, 4, 5, 6, 7)) == 0, "blocks without a state"
    assert num_cached(engine, (*beginning, 9, 9)) == 12


def test_a_conversation_goes_on_from_its_answer() -> None:
    engine = make_state_engine()
    answer = token_ids(ask(engine, PROMPT, 30))
    assert num_cached(engine, (*PROMPT, *answer, 5, 6)) == 48, "21 + 30 tokens were computed"


def test_states_are_kept_at_intervals_of_a_long_prompt() -> None:
    engine = make_state_engine(interval=8)
    assert num_cached(engine, PROMPT) == 0
    assert num_cached(engine, (*PROMPT[:18], 1, 1)) == 16


def test_what_was_not_used_the_longest_gives_way() -> None:
    engine = make_state_engine(num_seqs=1, num_copies=2)
    prompts = [(number, *PROMPT) for number in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        ask(engine, prompt, 1)
    assert num_cached(engine, prompts[0], 1) == 20
    assert num_cached(engine, prompts[1], 1) == 0


def test_a_state_without_its_blocks_is_of_no_use() -> None:
    engine = make_state_engine(num_blocks=6, num_seqs=1)
    ask(engine, PROMPT, 1)
    ask(engine, tuple(reversed(PROMPT)), 1)  # takes all blocks
    assert num_cached(engine, PROMPT, 1) == 0


def test_without_slots_for_copies_nothing_is_shared() -> None:
    engine = make_state_engine(num_copies=0)
    assert num_cached(engine, PROMPT) == num_cached(engine, PROMPT) == 0


def test_texts_with_other_adapters_share_no_state() -> None:
    engine = make_state_engine()
    blocks = engine._scheduler.blocks  # requests with adapters would need a bank of them
    ask(engine, PROMPT)
    for adapter, expected in (("", 20), ("ab" * 32, 0)):
        sequence = Sequence(make_request("r", PROMPT, adapter=adapter))
        assert blocks.match_prefix(sequence) == expected
        blocks.free(sequence)


def test_a_failed_text_leaves_no_state() -> None:
    engine = make_state_engine()
    poisoned = (*PROMPT, 31)  # see POISON in the fakes
    assert run(engine, make_request("r", poisoned))["r"][-1].error
    assert num_cached(engine, PROMPT) == 0


@pytest.mark.parametrize(
    "options", [{}, {"runs_ahead": True}, {"max_draft_tokens": 3}], ids=["plain", "ahead", "drafts"]
)
@pytest.mark.parametrize(("num_blocks", "num_copies"), [(24, 1), (24, 8), (64, 3), (64, 20)])
def test_tokens_are_right_whatever_is_shared_preempted_copied_and_guessed(
    num_blocks: int, num_copies: int, options: dict[str, Any]
) -> None:
    rng = random.Random(num_blocks + num_copies)
    engine = make_state_engine(
        num_blocks=num_blocks,
        num_seqs=5,
        num_copies=num_copies,
        interval=rng.choice([0, BLOCK_SIZE, 3 * BLOCK_SIZE]),
        **options,
        max_step_tokens=rng.choice([6, 17, 64]),
    )
    beginnings = [tuple(rng.choices(range(29), k=12)) for _ in range(3)]
    for _ in range(4):
        requests = [random_request(str(number), beginnings, rng) for number in range(10)]
        outputs = run(engine, *requests)
        for request in requests:
            expected = greedy_tokens(request.prompt_token_ids, request.max_new_tokens)
            assert token_ids(outputs[request.request_id]) == expected
    stats = engine.stats()
    assert stats.num_preemptions or num_blocks > 24
    assert stats.num_cached_tokens or num_copies < 8


def random_request(
    request_id: str, beginnings: list[tuple[int, ...]], rng: random.Random
) -> Request:
    beginning = rng.choice(beginnings)[: rng.choice([5, 8, 12])]
    prompt = (*beginning, *rng.choices(range(29), k=rng.randrange(1, 14)))
    return make_request(request_id, prompt, max_new_tokens=rng.randrange(1, 30))


@pytest.mark.parametrize("num_copies", [1, 3, 12])
def test_draft_tokens_take_the_slots_that_there_are(num_copies: int) -> None:
    """A model that counts, so that most guesses are right, some are not, and some find no slot."""
    engine = make_state_engine(num_copies=num_copies, max_draft_tokens=3, logits_of=counting_logits)
    prompts = {str(start): (*range(start, 10), *range(10), start) for start in range(4)}
    requests = [make_request(name, p, max_new_tokens=30) for name, p in prompts.items()]
    outputs = run(engine, *requests)
    for start in range(4):
        expected = [(start + 1 + number) % 10 for number in range(30)]
        assert token_ids(outputs[str(start)]) == expected
    assert engine.stats().num_steps < 31, "no guess was right"


def test_intervals_are_whole_blocks_and_leave_slots_to_other_texts() -> None:
    assert copy_interval(4096, 16, 64) == 256
    assert copy_interval(4096, 16, 8) == 2048
    assert copy_interval(1000, 48, 4) == 1008
    assert copy_interval(4096, 16, 3) == 0
