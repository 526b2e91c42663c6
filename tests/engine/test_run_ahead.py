"""Launching a step before the previous step's tokens are read changes no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.batch.model_input import ModelInput
from engine.engine import Engine
from engine.executor import Forward
from engine.protocol.request import Request
from tests.engine.fakes import (
    VOCAB_SIZE,
    FakeModel,
    greedy_tokens,
    make_engine,
    make_request,
    run,
    token_ids,
)
from tests.engine.loads import Arrival, arrivals, assert_same_answers, run_load


def prompt_logprobs(engine: Engine, request: Request) -> list[float | None]:
    return [value for output in run(engine, request)["0"] for value in output.prompt_logprobs]


@given(load=arrivals(), num_blocks=st.integers(8, 24), max_step_tokens=st.integers(3, 40))
def test_tokens_are_those_of_an_engine_that_waits(
    load: list[Arrival], num_blocks: int, max_step_tokens: int
) -> None:
    """Also with preemptions, end tokens and aborts."""
    options = {"num_blocks": num_blocks, "max_step_tokens": max_step_tokens}
    expected = run_load(make_engine(**options, runs_ahead=False), load)
    actual = run_load(make_engine(**options, runs_ahead=True), load)
    assert_same_answers(load, expected, actual)


def test_the_next_step_is_launched_before_tokens_are_read() -> None:
    engine = make_engine(runs_ahead=True)
    engine.add(Request(request_id="a", prompt_token_ids=(1, 2, 3), max_new_tokens=3))
    tokens = [engine.step().outputs for _ in range(3)]
    assert [len(outputs) for outputs in tokens] == [1, 1, 1]
    assert not engine.has_work  # no step was launched after the last allowed token


@pytest.mark.parametrize(
    ("sampling", "num_forwards"),
    [
        ({}, 2),
        ({"repetition_penalty": 1.3}, 2),
        ({"frequency_penalty": 0.7}, 2),
        ({"repetition_penalty": 1.2, "do_sample": True, "seed": 3}, 2),
        ({"watermark": True}, 1),  # the host makes its lists of tokens
    ],
    ids=str,
)
def test_penalties_of_a_row_do_not_keep_a_step_from_running_ahead(
    sampling: dict[str, Any], num_forwards: int
) -> None:
    calls: list[ModelInput] = []

    def counted(model: FakeModel) -> Forward:
        return lambda batch: calls.append(batch) or model(batch)

    engine = make_engine(runs_ahead=True, wrap=counted)
    engine.add(make_request("plain"))
    engine.add(make_request("asking", sampling=sampling))
    engine.step()
    assert len(calls) == num_forwards


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 3.0}, {"frequency_penalty": 2.0}])
def test_a_token_that_the_host_has_not_read_is_penalised(sampling: dict[str, Any]) -> None:
    """The likeliest token is always the last one, but for its penalty."""

    def last_again(token_ids: tuple[int, ...]) -> Tensor:
        logits = 2.0 - torch.arange(VOCAB_SIZE) / 10.0
        logits[token_ids[-1]] = 2.2
        return logits

    options = {"logits_of": last_again}
    request = make_request(prompt=(5, 6, 7), max_new_tokens=6, sampling=sampling)
    expected = run(make_engine(**options, runs_ahead=False), request)["r"]
    actual = run(make_engine(**options, runs_ahead=True), request)["r"]
    assert [output.token for output in actual] == [output.token for output in expected]
    plain = run(make_engine(**options, runs_ahead=True), make_request(prompt=(5, 6, 7)))["r"]
    assert set(token_ids(plain)) == {7}
    assert set(token_ids(actual)) != {7}


def test_an_end_token_is_the_last_output() -> None:
    ids = greedy_tokens((1, 2, 3), 8)
    eos = ids[3]
    request = Request(
        request_id="a",
        prompt_token_ids=(1, 2, 3),
        max_new_tokens=8,
        eos_token_ids=frozenset({eos}),
    )
    outputs = run(make_engine(runs_ahead=True), request)["a"]
    assert token_ids(outputs) == ids[: ids.index(eos) + 1]
    assert [output.is_last for output in outputs].count(True) == 1


def test_log_probabilities_of_prompts_are_the_same() -> None:
    request = Request(
        request_id="0", prompt_token_ids=tuple(range(20)), max_new_tokens=4, prompt_logprobs=True
    )
    values = [
        prompt_logprobs(make_engine(max_step_tokens=6, runs_ahead=ahead), request)
        for ahead in (False, True)
    ]
    assert values[0] == values[1]
    assert len(values[0]) == 20


def test_likeliest_tokens_of_a_prompt_go_with_its_log_probabilities() -> None:
    request = Request(
        request_id="0",
        prompt_token_ids=tuple(range(20)),
        max_new_tokens=4,
        prompt_logprobs=True,
        prompt_top_n=2,
    )
    answers = []
    for ahead in (False, True):
        outputs = run(make_engine(max_step_tokens=6, runs_ahead=ahead), request)["0"]
        assert all(len(item.prompt_tops) == len(item.prompt_logprobs) for item in outputs)
        answers.append([top for item in outputs for top in item.prompt_tops])
    assert answers[0] == answers[1]
    first, *others = answers[0]
    assert first == ()
    assert [len(top) for top in others] == [2] * 19
    assert all(top[0][1] >= top[1][1] for top in others)
