"""Recorded decode steps give the tokens of unrecorded ones.

Without a GPU a recording is a call at the same addresses, which is what a replay computes: what a
GPU adds is that Python is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import ModelInput
from engine.graphs import DecodeGraphs, Replay
from engine.request import Request
from tests.engine.fakes import (
    CPU,
    VOCAB_SIZE,
    FakeModel,
    greedy_tokens,
    make_engine,
    run,
    token_ids,
)
from tests.engine.loads import Arrival, arrivals, assert_same_answers, play

MAX_BLOCKS = 8
SIZES = (1, 2, 5)


class Recorder:
    """Remembers what was recorded and how often it was replayed."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replays = 0

    def __call__(self, run: Callable[[], object]) -> Replay:
        self.num_recorded += 1
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


def graphs(model: Callable[[ModelInput], Tensor], recorder: Recorder) -> DecodeGraphs:
    recorded = DecodeGraphs(model, SIZES, max_blocks=MAX_BLOCKS, vocab_size=VOCAB_SIZE, device=CPU)
    recorded.record(recorder)
    return recorded


@given(load=arrivals(), runs_ahead=st.booleans())
def test_tokens_are_those_of_an_engine_without(load: list[Arrival], runs_ahead: bool) -> None:
    recorder = Recorder()
    expected = play(make_engine(num_blocks=16), load)
    engine = make_engine(
        num_blocks=16, runs_ahead=runs_ahead, wrap=lambda model: graphs(model, recorder)
    )
    assert_same_answers(load, expected, play(engine, load))


def requests(count: int, prompt_tokens: int = 3) -> list[Request]:
    return [
        Request(
            request_id=f"{number}",
            prompt_token_ids=tuple(range(number, number + prompt_tokens)),
            max_new_tokens=4,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("num_requests", "num_replays"), [(1, 3), (3, 3), (5, 3), (6, 0)], ids=str)
def test_a_batch_takes_the_next_larger_size_if_there_is_one(
    num_requests: int, num_replays: int
) -> None:
    recorder = Recorder()
    engine = make_engine(wrap=lambda model: graphs(model, recorder))
    outputs = run(engine, *requests(num_requests))
    assert recorder.num_recorded == len(SIZES)
    assert recorder.num_replays == num_replays  # the first of four tokens comes from the prompt
    for request in requests(num_requests):
        tokens = token_ids(outputs[request.request_id])
        assert tokens == greedy_tokens(request.prompt_token_ids, 4)


def test_a_context_that_no_recording_has_room_for_is_computed_as_it_is() -> None:
    recorder = Recorder()
    engine = make_engine(wrap=lambda model: graphs(model, recorder))
    (request,) = requests(1, prompt_tokens=4 * MAX_BLOCKS - 2)
    tokens = token_ids(run(engine, request)["0"])
    assert tokens == greedy_tokens(request.prompt_token_ids, 4)
    assert recorder.num_replays == 2


def test_a_model_that_cannot_be_recorded_runs_all_the_same() -> None:
    def refuses(_: Callable[[], object]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    def wrap(model: FakeModel) -> DecodeGraphs:
        recorded = DecodeGraphs(
            model, SIZES, max_blocks=MAX_BLOCKS, vocab_size=VOCAB_SIZE, device=CPU
        )
        recorded.record(refuses)
        return recorded

    (request,) = requests(1)
    assert token_ids(run(make_engine(wrap=wrap), request)["0"]) == greedy_tokens((0, 1, 2), 4)


def test_rows_that_belong_to_nobody_store_nothing() -> None:
    model = FakeModel(num_blocks=4)
    before = model.slots.clone()
    graphs(model, Recorder())
    assert torch.equal(model.slots, before)
