"""A sequence's counts and how it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import FinishReason, Request
from engine.scheduling.sequence import Sequence, SequenceStatus


def make_sequence(
    *,
    max_new_tokens: int = 3,
    eos: frozenset[int] = frozenset(),
    stop: frozenset[int] = frozenset(),
    resumed: tuple[int, ...] = (),
) -> Sequence:
    """A sequence with the prompt 1, 2."""
    return Sequence(
        Request(
            request_id="r",
            prompt_token_ids=(1, 2),
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos,
            stop_token_ids=stop,
            resumed_token_ids=resumed,
        )
    )


def test_new_sequence_waits_with_its_whole_prompt_pending() -> None:
    sequence = make_sequence()
    assert sequence.status is SequenceStatus.WAITING
    assert sequence.num_pending_tokens == sequence.num_tokens == 2
    assert sequence.num_generated_tokens == 0
    assert sequence.max_tokens == 5


def test_resumed_tokens_count_as_generated() -> None:
    sequence = make_sequence(resumed=(7, 8))
    assert sequence.token_ids == [1, 2, 7, 8]
    assert sequence.num_prompt_tokens == 2
    assert sequence.num_generated_tokens == 2
    assert sequence.max_tokens == 5
    assert sequence.append(9) is FinishReason.LENGTH


def test_sequence_ends_at_max_new_tokens() -> None:
    sequence = make_sequence()
    assert [sequence.append(5) for _ in range(3)] == [None, None, FinishReason.LENGTH]


def test_end_token_ends_the_sequence_and_is_kept() -> None:
    sequence = make_sequence(eos=frozenset({7, 9}))
    assert sequence.append(5) is None
    assert sequence.append(9) is FinishReason.EOS_TOKEN
    assert sequence.token_ids == [1, 2, 5, 9]


def test_stop_token_ends_the_sequence_and_is_kept() -> None:
    sequence = make_sequence(eos=frozenset({7}), stop=frozenset({7, 9}))
    assert sequence.append(5) is None
    assert sequence.append(9) is FinishReason.STOP_TOKEN
    assert sequence.token_ids == [1, 2, 5, 9]


def test_end_token_comes_before_stop_token() -> None:
    sequence = make_sequence(eos=frozenset({7}), stop=frozenset({7}))
    assert sequence.append(7) is FinishReason.EOS_TOKEN


def test_end_token_in_the_prompt_ends_nothing() -> None:
    assert make_sequence(eos=frozenset({1, 2})).append(5) is None


def test_length_comes_before_end_token() -> None:
    sequence = make_sequence(max_new_tokens=1, eos=frozenset({9}))
    assert sequence.append(9) is FinishReason.LENGTH


def test_reset_keeps_tokens_and_marks_them_as_not_computed() -> None:
    sequence = make_sequence()
    sequence.append(5)
    sequence.num_computed_tokens, sequence.num_cached_tokens = 2, 1
    sequence.num_prompt_logprobs = 2
    sequence.status = SequenceStatus.RUNNING
    sequence.reset()
    assert sequence.token_ids == [1, 2, 5]
    assert sequence.num_pending_tokens == 3
    assert sequence.num_cached_tokens == 0
    assert sequence.num_preemptions == 1
    assert sequence.num_prompt_logprobs == 2
    assert sequence.status is SequenceStatus.WAITING


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 8), st.frozensets(st.integers(0, 9)))
def test_counts_add_up(tokens: list[int], max_new_tokens: int, eos: frozenset[int]) -> None:
    sequence = make_sequence(max_new_tokens=max_new_tokens, eos=eos)
    for token_id in tokens:
        reason = sequence.append(token_id)
        assert sequence.num_tokens == sequence.num_prompt_tokens + sequence.num_generated_tokens
        assert sequence.num_tokens == sequence.num_computed_tokens + sequence.num_pending_tokens
        assert (reason is FinishReason.LENGTH) == (sequence.num_tokens == sequence.max_tokens)
        if reason is not None:
            return
        assert token_id not in eos
