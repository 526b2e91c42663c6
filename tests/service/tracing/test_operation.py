"""What spans are made of the notes of a call."""

from __future__ import annotations

from typing import Any

import pytest

from engine.protocol.request import Moment, MomentKind
from service.call_record import CallRecord
from service.generation.parameters import Parameters
from service.timeline import SequenceTimeline, Stage
from service.tracing.operation import SpanPlan, operation_plan

MODEL = "some/model"


def text(*kinds_and_times: tuple[MomentKind, float], submitted: float = 11.0) -> SequenceTimeline:
    """A text to which this has happened."""
    sequence = SequenceTimeline(submitted=submitted)
    for kind, at in kinds_and_times:
        sequence.note(Moment("r", kind, at))
    return sequence


WHOLE = (
    (MomentKind.STARTED, 12.0),
    (MomentKind.FIRST_TOKEN, 14.0),
    (MomentKind.FINISHED, 20.0),
)


def plan_of(method: str = "Generate", **notes: Any) -> SpanPlan:
    record = CallRecord("id", began=10.0, **notes)
    return operation_plan(record, method, MODEL, 21.0)


def phases(plan: SpanPlan) -> list[tuple[str, float, float, str]]:
    return [(item.name, item.start, item.end, item.error_type) for item in plan.children]


def test_a_whole_generation() -> None:
    plan = plan_of(stages=[Stage("validate", 10.0, 11.0)], sequences=[text(*WHOLE)])
    assert (plan.name, plan.start, plan.end, plan.error_type) == (
        f"text_completion {MODEL}", 10.0, 21.0, "",
    )  # fmt: skip
    assert phases(plan) == [
        ("validate", 10.0, 11.0, ""),
        ("queue", 11.0, 12.0, ""),
        ("prefill", 12.0, 14.0, ""),
        ("decode", 14.0, 20.0, ""),
    ]
    assert [(event.name, event.at) for event in plan.events] == [("first_token", 14.0)]
    latencies = {
        name.removeprefix("gen_ai.latency."): value
        for name, value in plan.attributes.items()
        if name.startswith("gen_ai.latency.")
    }
    assert latencies == {
        "e2e": 11.0,
        "time_in_queue": 1.0,
        "time_to_first_token": 4.0,
        "time_in_model_prefill": 2.0,
        "time_in_model_decode": 6.0,
        "time_in_model_inference": 8.0,
    }


@pytest.mark.parametrize(
    ("method", "answer_id", "operation"),
    [
        ("Chat", "", "chat"),
        ("ChatUnary", "chatcmpl-1", "chat"),
        ("Completions", "cmpl-1", "text_completion"),
        ("Invocations", "", "text_completion"),
        ("Invocations", "chatcmpl-1", "chat"),
        ("CompatGenerate", "", "text_completion"),
    ],
)
def test_the_operation_is_named_by_rpc_and_model(
    method: str, answer_id: str, operation: str
) -> None:
    plan = plan_of(method, answer_id=answer_id)
    assert plan.name == f"{operation} {MODEL}"
    assert plan.attributes["gen_ai.operation.name"] == operation


@pytest.mark.parametrize(
    ("moments", "failed"), [(WHOLE[:0], "queue"), (WHOLE[:1], "prefill"), (WHOLE[:2], "decode")]
)
def test_an_error_counts_for_the_phase_that_had_begun(
    moments: tuple[tuple[MomentKind, float], ...], failed: str
) -> None:
    sequence = text(*moments)
    sequence.ended = 15.0
    stages = [Stage("validate", 10.0, 11.0)]
    plan = plan_of(stages=stages, sequences=[sequence], error_type="generation")
    assert plan.error_type == "generation"
    assert phases(plan)[-1][0] == failed
    assert [(item.name, item.end) for item in plan.children if item.error_type] == [(failed, 15.0)]


@pytest.mark.parametrize(
    ("error", "names"),
    [("validation", ["validate"]), ("tool_error", ["validate"]), ("overloaded", []), ("", [])],
)
def test_what_could_not_be_read_failed_in_validation(error: str, names: list[str]) -> None:
    assert [item.name for item in plan_of(error_type=error).children] == names


def test_preemptions_and_lost_engines_are_events_in_their_order() -> None:
    first = text(*WHOLE[:2], (MomentKind.PREEMPTED, 15.0), (MomentKind.RESUMED, 16.0))
    other = text(*WHOLE)
    other.events.append(("engine_lost", 14.5))
    other.note(Moment("r", MomentKind.STARTED, 15.5))  # by a new engine
    other.note(Moment("r", MomentKind.FIRST_TOKEN, 15.75))
    plan = plan_of(sequences=[first, other], num_choices=2)
    found = [
        (event.name, event.at, event.attributes["tokenwire.sequence"]) for event in plan.events
    ]
    assert found == [
        ("first_token", 14.0, 0),
        ("first_token", 14.0, 1),
        ("engine_lost", 14.5, 1),
        ("preempted", 15.0, 0),
        ("resumed", 15.5, 1),
        ("resumed", 16.0, 0),
    ]


def test_attributes_are_those_that_were_asked_for() -> None:
    parameters = Parameters(
        max_new_tokens=7,
        temperature=0.5,
        top_k=3,
        seed=2**64 - 1,
        stop=("a",),
        adapter_id="x" * 999,
    )
    given = plan_of(
        parameters=parameters,
        num_choices=3,
        is_stream=True,
        num_prompt_tokens=5,
        num_generated_tokens=6,
        num_cached_tokens=4,
        finish_reasons=["eos_token", "length", "stop_sequence"],
        answer_id="cmpl-1",
    ).attributes
    assert given["gen_ai.request.model"] == "x" * 256
    assert given["gen_ai.request.seed"] == -1
    assert given["gen_ai.request.top_k"] == 3
    assert given["gen_ai.request.choice.count"] == 3
    assert given["gen_ai.request.stop_sequences"] == ["a"]
    assert given["gen_ai.response.finish_reasons"] == ["stop", "length", "stop"]
    assert given["gen_ai.usage.cache_read.input_tokens"] == 4
    assert "gen_ai.request.top_p" not in given
    assert "gen_ai.input.messages" not in given


def test_the_first_error_counts_unless_the_call_was_only_ended() -> None:
    record = CallRecord("id")
    record.fail("cancelled")
    record.fail("slow_reader")
    record.fail("cancelled")
    assert record.error_type == "slow_reader"
