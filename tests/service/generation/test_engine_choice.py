"""Which engine a request goes to: prefixes, and the bound on how busy an engine may be."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.generation.engine_choice import EngineChoice

BLOCK = 4
IDLE = {0: 0, 1: 0, 2: 0}


def make(*, prefix_affinity: bool = True, max_remembered: int = 1000) -> EngineChoice:
    return EngineChoice(BLOCK, prefix_affinity=prefix_affinity, max_remembered=max_remembered)


def prompt(topic: int, num_blocks: int = 4, question: int = 0) -> list[int]:
    """Blocks that all prompts of a topic begin with, and one of its own."""
    return [topic] * (num_blocks - 1) * BLOCK + [1000 + question] * BLOCK


def choose(
    choice: EngineChoice, ids: list[int], loads: Mapping[int, int] = IDLE, adapter: str = ""
) -> int:
    return choice.choose(ids, adapter, loads)


def test_prompts_with_a_shared_beginning_go_to_the_same_engine() -> None:
    choice = make()
    homes = [choose(choice, prompt(topic)) for topic in range(3)]
    assert sorted(homes) == [0, 1, 2], "those with nothing in common are spread"
    for question in range(1, 10):
        assert [choose(choice, prompt(topic, question=question)) for topic in range(3)] == homes


def test_without_affinity_engines_take_turns() -> None:
    choice = make(prefix_affinity=False)
    assert [choose(choice, prompt(0)) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert choice.num_remembered == 0


def test_a_conversation_stays_where_its_beginning_is() -> None:
    choice = make()
    ids = prompt(0)
    home = choose(choice, ids)
    for turn in range(10):
        ids = ids + [2000 + turn] * BLOCK
        assert choose(choice, ids) == home


def test_the_engine_that_knows_more_of_a_prompt_gets_it() -> None:
    choice = make()
    choose(choice, prompt(0, 8), {0: 0})
    choose(choice, prompt(0, 8)[: 3 * BLOCK] + [7] * 5 * BLOCK, {1: 0})
    assert choose(choice, prompt(0, 8)) == 0
    assert choose(choice, prompt(0, 8)[: 3 * BLOCK] + [7] * 5 * BLOCK) == 1


def test_the_first_few_tokens_alone_decide_nothing() -> None:
    choice = make()
    common = [1] * BLOCK
    homes = [choose(choice, common + [2 + topic] * 7 * BLOCK) for topic in range(3)]
    assert sorted(homes) == [0, 1, 2]


def test_adapters_are_told_apart() -> None:
    choice = make()
    assert choose(choice, prompt(0), adapter="a") == 0
    assert choose(choice, prompt(0), adapter="b") == 1
    assert choose(choice, prompt(0), adapter="a") == 0


def test_images_are_told_apart_from_where_they_begin() -> None:
    choice = make()
    ids = [1] * BLOCK + [99] * 7 * BLOCK
    for digest, engine in ((b"cat", 0), (b"dog", 1), (b"cat", 0)):
        assert choice.choose(ids, "", IDLE, [(BLOCK + 1, digest)]) == engine


def test_a_prompt_without_a_full_block_goes_to_the_least_busy_engine() -> None:
    choice = make()
    assert [choose(choice, [1, 2, 3]) for _ in range(3)] == [0, 1, 2]
    assert choose(choice, [1, 2, 3], {0: 2, 1: 1, 2: 2}) == 1


@pytest.mark.parametrize(
    ("loads", "engine"),
    [({0: 8, 1: 0}, 0), ({0: 9, 1: 0}, 1), ({0: 45, 1: 30}, 0), ({0: 46, 1: 30}, 1)],
)
def test_an_engine_that_is_much_busier_loses_its_prompts(
    loads: Mapping[int, int], engine: int
) -> None:
    choice = make()
    choose(choice, prompt(0), {0: 0})
    assert choose(choice, prompt(0), loads) == engine


def test_a_beginning_that_many_ask_for_is_known_to_several_engines() -> None:
    choice = make()
    choose(choice, prompt(0), {0: 0})
    assert choose(choice, prompt(0), {0: 20, 1: 0, 2: 1}) == 1
    assert choose(choice, prompt(0), {0: 5, 1: 6, 2: 0}) == 0, "the less busy of both"
    assert choose(choice, prompt(0), {0: 6, 1: 5, 2: 0}) == 1


def test_an_engine_that_lost_its_cache_is_like_any_other() -> None:
    choice = make()
    choose(choice, prompt(0), {1: 0})
    choice.forget(1)
    assert choice.num_remembered == 0
    assert choose(choice, prompt(0), {1: 1, 2: 0}) == 2


def test_what_others_know_is_not_forgotten_with_an_engine() -> None:
    choice = make()
    for engine in (1, 2):
        choose(choice, prompt(0), {engine: 0})
    choice.forget(1)
    assert choose(choice, prompt(0), {0: 0, 1: 0, 2: 5}) == 2


def test_without_engines_there_is_no_choice() -> None:
    with pytest.raises(ValueError, match="empty"):
        choose(make(), prompt(0), {})


PROMPTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=60
)


@given(PROMPTS, st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=60, max_size=60))
def test_only_engines_that_are_offered_are_chosen(
    asked: list[tuple[int, int, int]], alive: list[set[int]]
) -> None:
    choice = make(max_remembered=20)
    for (topic, blocks, question), live in zip(asked, alive, strict=False):
        loads = dict.fromkeys(live, 0)
        assert choose(choice, prompt(topic, blocks, question), loads) in live
        assert choice.num_remembered <= 20


@given(PROMPTS, st.integers(2, 5), st.lists(st.integers(0, 4), min_size=60, max_size=60))
def test_no_engine_gets_far_ahead_of_the_others(
    asked: list[tuple[int, int, int]], num_engines: int, ends: list[int]
) -> None:
    """Whatever prompts have in common, and in whatever order they end."""
    choice, loads = make(), dict.fromkeys(range(num_engines), 0)
    for (topic, blocks, question), ended in zip(asked * 3, ends * 3, strict=False):
        least = min(loads.values())
        chosen = choose(choice, prompt(topic, blocks, question), loads)
        assert loads[chosen] <= max(least + 8, 1.5 * least)
        loads[chosen] += 1
        if ended < num_engines and loads[ended]:
            loads[ended] -= 1
