"""Requests that end early: aborted, refused, or failed together with a step or a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.batch.model_input import ModelInput
from engine.engine import Engine
from engine.executor import LaunchedStep
from engine.protocol.request import Request
from tests.engine.fakes import (
    BLOCK_SIZE,
    FATAL,
    POISON,
    greedy_tokens,
    make_engine,
    make_request,
    run,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("runs_ahead")


def report_late(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Makes every step fail when its results are read, as errors on a device do."""

    def wait(_: LaunchedStep) -> None:
        raise error

    patch.setattr(LaunchedStep, "wait", wait)


class TestAbort:
    """Aborting a request."""

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
        if engine.has_work:  # a launched step, whose results are dropped
            assert engine.step().outputs == ()
        assert not engine.has_work

    def test_of_an_unknown_or_finished_request_does_nothing(self) -> None:
        engine = make_engine()
        run(engine, make_request())
        engine.abort("r")
        engine.abort("unknown")
        assert not engine.has_work

    def test_frees_the_request_id(self) -> None:
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

    def test_of_an_id_in_use_does_not_affect_the_first_request(self) -> None:
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
        # Otherwise one token too many is generated, or the queue's head never fits and blocks it.
        engine = make_engine(num_blocks=4)
        self.refused(engine, make_request(max_new_tokens=max_new_tokens, resumed_token_ids=resumed))
        assert not engine.has_work


class TestFailure:
    """How the failure of a step or a row affects other requests."""

    def test_failed_forward_ends_the_rows_of_that_step_only(self, runs_ahead: bool) -> None:
        engine = make_engine(max_num_seqs=2, max_step_tokens=8)
        engine.add(make_request("old"))
        assert engine.step().outputs[0].error is None
        engine.add(make_request("bad", (1, FATAL)))
        engine.add(make_request("waits"))
        if runs_ahead:  # the step that is launched already was planned before "bad" came
            assert [output.error for output in engine.step().outputs] == [None]
        step = engine.step()
        assert step.has_failed
        outputs = step.outputs
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

    def test_a_lost_device_ends_the_engine_when_reported_late(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine()
        engine.add(make_request())
        report_late(monkeypatch, torch.AcceleratorError("device-side assert triggered"))
        with pytest.raises(torch.AcceleratorError, match="assert"):
            engine.step()

    def test_another_failure_reported_late_ends_the_rows_of_its_step_only(
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

    def test_failed_row_frees_its_blocks(self) -> None:
        engine = make_engine()
        run(engine, make_request("bad", (1, POISON)))
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert token_ids(run(engine, make_request("bad"))["bad"]) == greedy_tokens((1, 2, 3), 5)
