"""The step loop over a fake model whose every token depends on its whole context."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import executor
from engine.batch import ModelInput
from engine.engine import Engine
from engine.executor import LaunchedStep
from engine.protocol.request import FinishReason, Request, SamplingParams, SequenceOutput
from engine.transfer import Download
from tests.engine.fakes import (
    BLOCK_SIZE,
    FATAL,
    POISON,
    RUNS_AHEAD,
    VOCAB_SIZE,
    greedy_tokens,
    make_engine,
    next_logits,
    run,
    token_ids,
)

NUM_TEXT_TOKENS = VOCAB_SIZE - 2  # ids that stand for no failure


@pytest.fixture(autouse=True, params=[False, True], ids=["step by step", "running ahead"])
def runs_ahead(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Everything holds whether or not a step waits for the tokens of the one before."""
    token = RUNS_AHEAD.set(request.param)
    yield request.param
    RUNS_AHEAD.reset(token)


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    *,
    max_new_tokens: int = 5,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> Request:
    """A request with these parameters."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(**(sampling or {})),
        **options,
    )


def random_prompts(count: int, *, longest: int = 24, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of which half begin alike."""
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


def report_late(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Lets every step fail when it is waited for, as a device does."""

    def wait(_: LaunchedStep) -> None:
        raise error

    patch.setattr(LaunchedStep, "wait", wait)


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
def test_a_resumed_request_continues_as_if_unbroken(
    sampling: dict[str, Any], num_before: int
) -> None:
    unbroken = run(make_engine(), make_request(max_new_tokens=12, sampling=sampling))["r"]
    before = tuple(token_ids(unbroken)[:num_before])
    resumed = make_request(max_new_tokens=12, sampling=sampling, resumed_token_ids=before)
    outputs = run(make_engine(max_step_tokens=4), resumed)["r"]
    assert [o.token for o in outputs if o.token] == [o.token for o in unbroken][num_before:]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.9}, {"frequency_penalty": 30.0}])
def test_penalties_work_on_what_the_model_returns(sampling: dict[str, Any]) -> None:
    request = make_request(max_new_tokens=12, sampling=sampling)
    outputs = run(make_engine(), request)["r"]
    assert [output.error for output in outputs] == [None] * 12
    assert token_ids(outputs) != greedy_tokens((1, 2, 3), 12)


def test_top_tokens_are_reported_for_those_who_ask() -> None:
    asks, other = make_request("a", sampling={"top_n_tokens": 3}), make_request("b")
    outputs = run(make_engine(), asks, other)
    assert all(o.token is not None and len(o.token.top) == 3 for o in outputs["a"])
    assert all(o.token is not None and o.token.top == () for o in outputs["b"])


class TestAbort:
    """Ending a request from outside."""

    def test_frees_blocks_before_the_next_step(self) -> None:
        engine = make_engine()
        engine.add(make_request("gone", tuple(range(20)), max_new_tokens=50))
        engine.add(make_request("stays"))
        engine.step()
        engine.abort("gone")
        engine.check_integrity()
        assert engine.stats().num_free_blocks == engine.stats().num_blocks - 1
        assert [output.request_id for output in engine.step().outputs] == ["stays"]

    def test_works_while_the_prompt_is_computed_and_while_it_waits(self) -> None:
        engine = make_engine(max_step_tokens=4)
        engine.add(make_request("prefilling", tuple(range(20))))
        engine.add(make_request("waiting", tuple(range(20))))
        engine.step()
        engine.abort("prefilling")
        engine.abort("waiting")
        engine.check_integrity()
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        if engine.has_work:  # a step is on the device; nobody waits for what it brings
            assert engine.step().outputs == ()
        assert not engine.has_work

    def test_of_an_unknown_or_finished_request_does_nothing(self) -> None:
        engine = make_engine()
        run(engine, make_request())
        engine.abort("r")
        engine.abort("nobody")
        assert not engine.has_work

    def test_frees_the_id(self) -> None:
        engine = make_engine()
        engine.add(make_request())
        engine.step()
        engine.abort("r")
        assert token_ids(run(engine, make_request())["r"]) == greedy_tokens((1, 2, 3), 5)


class TestRefusal:
    """Requests that end before they start."""

    @staticmethod
    def refused(engine: Engine, request: Request) -> str:
        """The error of a request that must not be accepted."""
        output = engine.add(request)
        assert output is not None
        assert output.request_id == request.request_id
        assert output.error
        assert output.finish_reason is None
        assert output.token is None
        return output.error

    def test_of_a_request_larger_than_the_cache(self) -> None:
        engine = make_engine(num_blocks=2)
        assert "do not fit" in self.refused(engine, make_request(max_new_tokens=100))
        assert not engine.has_work

    def test_of_an_empty_prompt(self) -> None:
        self.refused(make_engine(), make_request(prompt=()))

    def test_of_an_id_in_use_leaves_the_first_alone(self) -> None:
        engine = make_engine()
        engine.add(make_request())
        self.refused(engine, make_request(prompt=(9, 9)))
        assert token_ids(run(engine)["r"]) == greedy_tokens((1, 2, 3), 5)

    @pytest.mark.parametrize(
        ("max_new_tokens", "resumed"), [(0, ()), (2, (5, 6)), (2, tuple(range(40)))]
    )
    def test_of_a_request_with_nothing_left_to_generate(
        self, max_new_tokens: int, resumed: tuple[int, ...]
    ) -> None:
        # Otherwise a token too many is made, or the queue's head never fits and blocks everybody.
        engine = make_engine(num_blocks=4)
        self.refused(engine, make_request(max_new_tokens=max_new_tokens, resumed_token_ids=resumed))
        assert not engine.has_work


class TestFailure:
    """What one bad step or row does to the others."""

    def test_failed_forward_ends_the_rows_of_that_step_only(self, runs_ahead: bool) -> None:
        engine = make_engine(max_num_seqs=2, max_step_tokens=8)
        engine.add(make_request("old"))
        assert engine.step().outputs[0].error is None
        engine.add(make_request("bad", (1, FATAL)))
        engine.add(make_request("waits"))
        if runs_ahead:  # the step that is on the device already knows nothing of "bad"
            assert [output.error for output in engine.step().outputs] == [None]
        outputs = engine.step().outputs
        assert {output.request_id for output in outputs} == {"old", "bad"}
        assert all(output.error and output.token is None for output in outputs)
        engine.check_integrity()
        assert engine.stats().num_running == 0
        assert token_ids(run(engine)["waits"]) == greedy_tokens((1, 2, 3), 5)

    def test_a_lost_device_ends_the_engine(self) -> None:
        def lost(_: ModelInput) -> Tensor:
            raise torch.AcceleratorError("an illegal memory access was encountered")

        engine = make_engine(wrap=lambda _: lost)
        engine.add(make_request())
        with pytest.raises(torch.AcceleratorError, match="illegal"):
            engine.step()

    def test_a_lost_device_ends_the_engine_when_it_says_so_late(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine()
        engine.add(make_request())
        report_late(monkeypatch, torch.AcceleratorError("device-side assert triggered"))
        with pytest.raises(torch.AcceleratorError, match="assert"):
            engine.step()

    def test_another_failure_that_comes_late_ends_the_rows_of_its_step_only(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine()
        engine.add(make_request("bad"))
        with monkeypatch.context() as patched:
            report_late(patched, torch.OutOfMemoryError("no room"))
            assert [bool(output.error) for output in engine.step().outputs] == [True]
        assert token_ids(run(engine, make_request("good"))["good"]) == greedy_tokens((1, 2, 3), 5)

    def test_row_without_valid_logits_fails_alone(self) -> None:
        requests = [make_request("bad", (1, POISON)), make_request("good"), make_request("also")]
        outputs = run(make_engine(), *requests)
        assert len(outputs["bad"]) == 1
        assert outputs["bad"][0].error
        assert outputs["bad"][0].token is None
        for name in ("good", "also"):
            assert token_ids(outputs[name]) == greedy_tokens((1, 2, 3), 5)

    def test_blocks_of_a_failed_row_are_not_shared(self) -> None:
        engine = make_engine()
        prompt = (*range(2 * BLOCK_SIZE), POISON, 1)
        run(engine, make_request("bad", prompt))
        run(engine, make_request("again", prompt))
        assert engine.stats().num_cached_tokens == 0, "its keys and values may be no numbers either"

    def test_failed_row_gives_its_blocks_back(self) -> None:
        engine = make_engine()
        run(engine, make_request("bad", (1, POISON)))
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert token_ids(run(engine, make_request("bad"))["bad"]) == greedy_tokens((1, 2, 3), 5)


class TestPromptLogprobs:
    """The log-probabilities of prompts."""

    @staticmethod
    def check(prompt: tuple[int, ...], outputs: list[SequenceOutput]) -> None:
        """Asserts that a request's outputs bring the prompt's log-probabilities exactly once."""
        values = [value for output in outputs for value in output.prompt_logprobs]
        assert len(values) == len(prompt)
        assert values[0] is None
        for place in range(1, len(prompt)):
            expected = next_logits(prompt[:place]).log_softmax(-1)[prompt[place]]
            assert values[place] == pytest.approx(float(expected), abs=1e-5)

    @pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 17])
    @pytest.mark.parametrize("max_logprob_rows", [1, 4, 256])
    def test_are_complete_however_the_prompt_is_cut(
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


def test_a_step_that_gives_nobody_a_token_is_waited_for_all_the_same(
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
    assert len(waited) == 2  # the tokens are what was waited for


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


def test_an_idle_step_computes_nothing() -> None:
    engine = make_engine()
    step = engine.step()
    assert step.outputs == ()
    assert step.stats.num_steps == 0


def test_logprobs_are_numbers_a_client_can_add_up() -> None:
    outputs = run(make_engine(), make_request(max_new_tokens=8))["r"]
    assert all(o.token is not None and math.isfinite(o.token.logprob) for o in outputs)


def test_the_engine_leaves_gradients_as_it_found_them() -> None:
    run(make_engine(), make_request())
    assert torch.is_grad_enabled()
