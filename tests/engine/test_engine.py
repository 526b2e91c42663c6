"""The step loop over a fake model whose every token depends on its whole context."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import executor
from engine.batch.model_input import ModelInput
from engine.executor import Forward
from engine.protocol.request import FinishReason, SequenceOutput
from engine.transfer import Download
from tests.engine.fakes import (
    VOCAB_SIZE,
    FakeModel,
    greedy_tokens,
    make_engine,
    make_request,
    next_logits,
    run,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("runs_ahead")

NUM_TEXT_TOKENS = VOCAB_SIZE - 2  # ids below POISON and FATAL


def random_prompts(count: int, *, longest: int = 24, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of which half have a common prefix."""
    rng = random.Random(seed)
    beginning = [rng.randrange(NUM_TEXT_TOKENS) for _ in range(longest // 2)]
    return [
        tuple(
            beginning[: rng.choice([0, len(beginning)])]
            + [rng.randrange(NUM_TEXT_TOKENS) for _ in range(rng.randrange(1, longest // 2))]
        )
        for _ in range(count)
    ]


def reasons(outputs: list[SequenceOutput]) -> list[FinishReason | None]:
    """The finish reasons of a request's outputs."""
    return [output.finish_reason for output in outputs]


def test_greedy_stream_gives_one_token_a_step_and_ends_once() -> None:
    outputs = run(make_engine(), make_request())["r"]
    assert token_ids(outputs) == greedy_tokens((1, 2, 3), 5)
    assert reasons(outputs) == [None] * 4 + [FinishReason.LENGTH]
    assert [output.first_scheduled for output in outputs] == [True] + [False] * 4
    assert outputs[0].token is not None
    logprobs = next_logits((1, 2, 3)).log_softmax(-1)
    assert outputs[0].token.logprob == pytest.approx(float(logprobs.max()), abs=1e-6)


def test_end_token_ends_the_stream_and_is_part_of_it() -> None:
    expected = greedy_tokens((1, 2, 3), 5)
    assert expected[2] not in expected[:2]
    outputs = run(make_engine(), make_request(eos_token_ids=frozenset({expected[2]})))["r"]
    assert token_ids(outputs) == expected[:3]
    assert outputs[-1].finish_reason is FinishReason.EOS_TOKEN


def test_length_comes_before_end_token() -> None:
    expected = greedy_tokens((1, 2, 3), 1)
    request = make_request(max_new_tokens=1, eos_token_ids=frozenset(expected))
    outputs = run(make_engine(), request)["r"]
    assert reasons(outputs) == [FinishReason.LENGTH]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize(
    ("num_blocks", "max_step_tokens"), [(64, 64), (64, 5), (12, 64), (12, 5), (12, 1)]
)
def test_tokens_do_not_depend_on_batching(
    num_blocks: int, max_step_tokens: int, enable_prefix_caching: bool
) -> None:
    prompts = random_prompts(10)
    engine = make_engine(
        num_blocks=num_blocks,
        max_step_tokens=max_step_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    requests = [make_request(str(i), p, max_new_tokens=9) for i, p in enumerate(prompts)]
    outputs = run(engine, *requests)

    for index, prompt in enumerate(prompts):
        assert token_ids(outputs[str(index)]) == greedy_tokens(prompt, 9)
    stats = engine.stats()
    assert (stats.num_cached_tokens > 0) == enable_prefix_caching
    if num_blocks == 12 and max_step_tokens > 1:
        assert stats.num_preemptions > 0
    assert stats.num_free_blocks == num_blocks


def test_same_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption() -> None:
    sampling = {"do_sample": True, "seed": 2**64 - 1, "temperature": 0.9, "top_p": 0.95}
    wanted = make_request("wanted", (4, 5, 6), max_new_tokens=20, sampling=sampling)
    others = [
        make_request(str(i), p, max_new_tokens=12, sampling={"do_sample": True, "seed": i})
        for i, p in enumerate(random_prompts(32))
    ]
    alone = token_ids(run(make_engine(), wanted)["wanted"])
    roomy, tight = make_engine(num_blocks=400, max_step_tokens=512), make_engine(num_blocks=14)
    assert token_ids(run(roomy, *others[:16], wanted, *others[16:])["wanted"]) == alone
    assert token_ids(run(tight, *others[:2], wanted, *others[2:])["wanted"]) == alone
    assert tight.stats().num_preemptions > 0
    assert alone != greedy_tokens((4, 5, 6), 20)


def test_different_seeds_give_different_tokens() -> None:
    requests = [
        make_request(str(i), max_new_tokens=12, sampling={"do_sample": True, "seed": i})
        for i in range(8)
    ]
    outputs = run(make_engine(), *requests)
    assert len({tuple(token_ids(stream)) for stream in outputs.values()}) == 8


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"do_sample": True, "seed": 7},
        {"do_sample": True, "seed": 7, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("num_before", [1, 6, 11])
def test_a_resumed_request_continues_with_the_same_tokens(
    sampling: dict[str, Any], num_before: int
) -> None:
    unbroken = run(make_engine(), make_request(max_new_tokens=12, sampling=sampling))["r"]
    before = tuple(token_ids(unbroken)[:num_before])
    resumed = make_request(max_new_tokens=12, sampling=sampling, resumed_token_ids=before)
    outputs = run(make_engine(max_step_tokens=4), resumed)["r"]
    assert [o.token for o in outputs if o.token] == [o.token for o in unbroken][num_before:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.9}, {"frequency_penalty": 30.0}])
def test_penalties_can_write_to_the_models_logits(sampling: dict[str, Any]) -> None:
    request = make_request(max_new_tokens=12, sampling=sampling)
    outputs = run(make_engine(), request)["r"]
    assert [output.error for output in outputs] == [None] * 12
    assert token_ids(outputs) != greedy_tokens((1, 2, 3), 12)


def test_top_tokens_are_reported_to_requests_that_ask_for_them() -> None:
    asks, other = make_request("a", sampling={"top_n_tokens": 3}), make_request("b")
    outputs = run(make_engine(), asks, other)
    assert all(o.token is not None and len(o.token.top) == 3 for o in outputs["a"])
    assert all(o.token is not None and o.token.top == () for o in outputs["b"])


class TestPromptLogprobs:
    """Log-probabilities of prompts."""

    @staticmethod
    def check(prompt: tuple[int, ...], outputs: list[SequenceOutput]) -> None:
        """Asserts that a request's outputs have the prompt's log-probabilities exactly once."""
        values = [value for output in outputs for value in output.prompt_logprobs]
        assert len(values) == len(prompt)
        assert values[0] is None
        for position in range(1, len(prompt)):
            expected = next_logits(prompt[:position]).log_softmax(-1)[prompt[position]]
            assert values[position] == pytest.approx(float(expected), abs=1e-5)

    @pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 17])
    @pytest.mark.parametrize("max_logprob_rows", [1, 4, 256])
    def test_are_complete_however_the_prompt_is_chunked(
        self, length: int, max_logprob_rows: int
    ) -> None:
        prompt = tuple(range(length))
        engine = make_engine(max_logprob_rows=max_logprob_rows)
        outputs = run(engine, make_request(prompt=prompt, prompt_logprobs=True))["r"]
        self.check(prompt, outputs)
        assert token_ids(outputs) == greedy_tokens(prompt, 5)

    def test_are_complete_after_preemption_in_a_mixed_batch(self) -> None:
        prompts = random_prompts(12)
        engine = make_engine(num_blocks=12, max_step_tokens=7)
        outputs = run(
            engine,
            *(
                make_request(str(i), p, max_new_tokens=9, prompt_logprobs=i % 2 == 0)
                for i, p in enumerate(prompts)
            ),
        )
        assert engine.stats().num_preemptions > 0
        for index, prompt in enumerate(prompts):
            stream = outputs[str(index)]
            assert token_ids(stream) == greedy_tokens(prompt, 9)
            if index % 2 == 0:
                self.check(prompt, stream)
            else:
                assert not any(output.prompt_logprobs for output in stream)

    def test_are_those_before_filters_and_penalties(self) -> None:
        prompt = (1, 2, 1, 2, 1)
        sampling = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.5, "temperature": 0.5}
        request = make_request(prompt=prompt, prompt_logprobs=True, sampling=sampling)
        self.check(prompt, run(make_engine(), request)["r"])


def test_a_step_without_tokens_is_waited_for_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[int] = []

    class Noted(Download):
        def wait(self) -> Tensor:
            waited.append(1)
            return super().wait()

    monkeypatch.setattr(executor, "Download", Noted)
    engine = make_engine(max_step_tokens=5)
    engine.add(make_request(prompt=tuple(range(14))))
    assert [(engine.step().outputs[0].token, len(waited)) for _ in range(2)] == [
        (None, 1),
        (None, 2),
    ]
    assert engine.step().outputs[0].token
    assert len(waited) == 2  # this step waits for its tokens instead


def test_stats_count_what_happened() -> None:
    engine = make_engine()
    prompt = tuple(range(10))
    run(engine, make_request("first", prompt))
    run(engine, make_request("second", prompt))
    stats = engine.stats()
    assert stats.num_prompt_tokens == 20
    assert stats.num_cached_tokens == 8
    assert stats.num_generated_tokens == 10
    assert stats.num_steps == 10
    assert stats.num_running == stats.num_waiting == stats.num_preemptions == 0
    assert stats.num_free_blocks == stats.num_blocks == 64


def test_steps_that_were_replayed_are_told_and_counted(runs_ahead: bool) -> None:
    replays: list[ModelInput] = []

    def of_one_token(model: FakeModel) -> Forward:
        def forward(batch: ModelInput) -> Tensor:
            if len(batch.input_ids) == 1:
                replays.append(batch)
            return model(batch)

        return forward

    engine = make_engine(wrap=of_one_token, num_replays=lambda: len(replays))
    engine.add(make_request())
    assert [engine.step().is_replayed for _ in range(5)] == [False, True, True, True, True]
    stats = engine.stats()
    assert (stats.num_steps, stats.num_replayed_steps) == (5, 4)


def test_a_step_reports_its_load_and_its_time(runs_ahead: bool) -> None:
    engine = make_engine()
    engine.add(make_request())
    engine.step()
    engine.add(make_request("long", tuple(range(8))))
    if runs_ahead:
        engine.step()
    step = engine.step()
    assert step.num_scheduled_tokens == 9
    assert step.num_prefill_tokens == 8
    assert step.stats.num_running == 2
    assert step.forward_s > 0
    assert step.sample_s > 0
    assert runs_ahead or step.forward_s + step.sample_s <= step.duration_s
    assert (step.num_seqs, step.num_started_seqs) == (2, 1)
    assert step.schedule_s > 0
    assert 0 < step.collect_s <= step.duration_s
    assert step.release_s == 0
    assert not step.has_failed


def test_the_steps_of_a_request_tell_when_it_begins_and_when_it_leaves() -> None:
    engine = make_engine()
    engine.add(make_request(max_new_tokens=3))
    steps = [engine.step() for _ in range(3)]
    assert [step.num_started_seqs for step in steps] == [1, 0, 0]
    assert [step.release_s > 0 for step in steps] == [False, False, True]
    assert all(step.release_s <= step.collect_s for step in steps)


def test_stats_tell_what_the_batch_may_come_to() -> None:
    engine = make_engine()
    engine.add(make_request("a", tuple(range(4)), max_new_tokens=6))
    engine.add(make_request("b", tuple(range(9)), max_new_tokens=2))
    assert engine.stats().max_running_tokens == 0
    assert engine.step().stats.max_running_tokens == 4 + 6 + 9 + 2
    while engine.has_work:
        engine.step()
    assert engine.stats().max_running_tokens == 0


def test_an_idle_step_computes_nothing() -> None:
    engine = make_engine()
    step = engine.step()
    assert step.outputs == ()
    assert step.stats.num_steps == 0


def test_logprobs_are_numbers_a_client_can_add_up() -> None:
    outputs = run(make_engine(), make_request(max_new_tokens=8))["r"]
    assert all(o.token is not None and math.isfinite(o.token.logprob) for o in outputs)


def test_the_engine_does_not_change_grad_mode() -> None:
    run(make_engine(), make_request())
    assert torch.is_grad_enabled()
