"""Messages survive packing and parsing, and anything else is refused."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.protocol import wire
from engine.protocol.adapters import AdapterInfo
from engine.protocol.config import EngineInfo, RankMemory
from engine.protocol.request import (
    EngineStats,
    FinishReason,
    Moment,
    MomentKind,
    Request,
    SamplingParams,
    SequenceOutput,
    StepOutput,
    Token,
)

counts = st.integers(0, 2**40)
token_ids = st.lists(st.integers(0, 2**20), max_size=8).map(tuple)
floats = st.floats(allow_nan=False)
shares = st.none() | st.floats(0, 1)
requests = st.builds(
    Request,
    request_id=st.text(max_size=40),
    prompt_token_ids=token_ids,
    max_new_tokens=counts,
    sampling=st.builds(
        SamplingParams,
        do_sample=st.booleans(),
        seed=st.integers(0, 2**64 - 1),
        temperature=floats,
        top_k=st.none() | counts,
        top_p=shares,
        typical_p=shares,
        min_p=st.floats(0, 1),
        repetition_penalty=floats,
        frequency_penalty=floats,
        top_n_tokens=counts,
        watermark=st.booleans(),
        logit_bias=st.lists(st.tuples(st.integers(0, 2**32 - 1), floats), max_size=3).map(tuple),
    ),
    eos_token_ids=st.frozensets(st.integers(0, 2**20), max_size=4),
    stop_token_ids=st.frozensets(st.integers(0, 2**20), max_size=4),
    min_new_tokens=counts,
    prompt_logprobs=st.booleans(),
    prompt_top_n=counts,
    resumed_token_ids=token_ids,
    caller=st.text(max_size=8),
    priority=st.integers(-100, 100),
)
tokens = st.builds(
    Token,
    token_id=counts,
    logprob=floats,
    top=st.lists(st.tuples(counts, floats), max_size=3).map(tuple),
)
outputs = st.builds(
    SequenceOutput,
    request_id=st.text(max_size=40),
    token=st.none() | tokens,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    prompt_logprobs=st.lists(st.none() | floats, max_size=4).map(tuple),
    prompt_tops=st.lists(
        st.lists(st.tuples(counts, floats), max_size=2).map(tuple), max_size=4
    ).map(tuple),
    error=st.none() | st.text(max_size=40),
    first_scheduled=st.booleans(),
    num_cached_tokens=counts,
)
steps = st.builds(
    StepOutput,
    outputs=st.lists(outputs, max_size=4).map(tuple),
    stats=st.builds(EngineStats, **dict.fromkeys(EngineStats.__slots__, counts)),
    num_scheduled_tokens=counts,
    num_prefill_tokens=counts,
    forward_s=floats,
    sample_s=floats,
    duration_s=floats,
    moments=st.lists(
        st.builds(Moment, st.text(max_size=40), st.sampled_from(MomentKind), floats), max_size=3
    ).map(tuple),
    num_seqs=counts,
    num_started_seqs=counts,
    schedule_s=floats,
    collect_s=floats,
    release_s=floats,
    has_failed=st.booleans(),
    is_replayed=st.booleans(),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | floats | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def body_of(frame: bytes) -> bytes:
    """The body of a frame, whose length must be right."""
    header, body = frame[: wire.HEADER.size], frame[wire.HEADER.size :]
    assert wire.HEADER.unpack(header) == (len(body),)
    return body


@given(requests)
def test_requests_survive_the_wire(request: Request) -> None:
    kind, fields = wire.parse(body_of(wire.submit(request)))
    assert kind is wire.Kind.SUBMIT
    assert wire.parse_request(fields) == request


@given(steps)
def test_steps_survive_the_wire(step: StepOutput) -> None:
    kind, fields = wire.parse(body_of(wire.step(step)))
    assert kind is wire.Kind.STEP
    assert wire.parse_step(fields) == step


def test_logprobs_that_are_not_numbers_survive_the_wire() -> None:
    output = SequenceOutput(request_id="r", prompt_logprobs=(None, math.nan, -math.inf))
    _, fields = wire.parse(body_of(wire.step(StepOutput(outputs=(output,)))))
    none, nan, infinite = wire.parse_step(fields).outputs[0].prompt_logprobs
    assert none is None
    assert nan is not None
    assert math.isnan(nan)
    assert infinite == -math.inf


def test_engine_info_survives_the_wire() -> None:
    info = EngineInfo(
        model_id="m",
        model_sha=None,
        dtype="torch.float32",
        device="cpu",
        vocab_size=32,
        max_total_tokens=64,
        max_batch_total_tokens=256,
        block_size=4,
        attention="reference",
        adapters=(AdapterInfo("one", "/one", "00", 4),),
        notes=("first", "second"),
        ranks=(RankMemory(1 << 40, 5), RankMemory(3, 0)),
    )
    kind, fields = wire.parse(body_of(wire.ready(info)))
    assert kind is wire.Kind.READY
    assert wire.parse_info(fields) == info


@given(st.binary(max_size=60) | values.map(msgpack.packb))
@example(b"")
@example(b"\x05")
@example(b"\xc0")
@example(b"\x91" * 5000)
@example(b"\xd6\xff\x00\x00\x00\x00")
@example(msgpack.packb([[1]]))
@example(msgpack.packb([wire.Kind.ABORT, "r"]) + b"x")
def test_bytes_that_are_not_a_message_raise_value_error(body: bytes) -> None:
    try:
        kind, fields = wire.parse(body)
    except ValueError:
        return
    assert isinstance(kind, wire.Kind)
    assert isinstance(fields, tuple)


@given(st.lists(values, max_size=8))
def test_fields_that_are_not_a_request_raise_value_error(fields: list[Any]) -> None:
    with pytest.raises(ValueError):
        wire.parse_request(fields)


@pytest.mark.parametrize("bad", ["x", -1, 2**40, 1.5, None, [1]])
@pytest.mark.parametrize("field", [1, 6])
def test_prompts_that_are_not_token_ids_raise_value_error(bad: Any, field: int) -> None:
    fields = list(wire.parse(body_of(wire.submit(make_request())))[1])
    fields[field] = [1, bad]
    with pytest.raises(ValueError):
        wire.parse_request(fields)


@pytest.mark.parametrize("seed", [-1, 2**63 * 2.0, "x", None])
def test_seeds_that_are_not_unsigned_raise_value_error(seed: Any) -> None:
    fields = list(wire.parse(body_of(wire.submit(make_request())))[1])
    fields[3] = [seed if name == "seed" else value for name, value in sampling_fields(fields)]
    with pytest.raises(ValueError):
        wire.parse_request(fields)


def make_request() -> Request:
    """A plain request."""
    return Request(request_id="r", prompt_token_ids=(1, 2), max_new_tokens=3)


def sampling_fields(fields: list[Any]) -> list[tuple[str, Any]]:
    """The sampling parameters of a submit message, by name."""
    return list(zip(SamplingParams.__slots__, fields[3], strict=True))
