"""The engine's load: its last step, and tokens per second over a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import EngineStats, SequenceOutput, StepOutput, Token
from service.generation.load import WINDOW_S, LoadMeter


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(num_tokens: int, **stats: int) -> StepOutput:
    """A step that gives so many sequences a token, and one sequence none."""
    outputs = [SequenceOutput(str(i), token=Token(i, -0.5)) for i in range(num_tokens)]
    return StepOutput(outputs=(*outputs, SequenceOutput("p")), stats=EngineStats(**stats))


def test_load_before_the_first_step_is_nothing() -> None:
    load = LoadMeter().load()
    assert (load.num_running, load.num_waiting, load.kv_cache_use, load.tokens_per_s) == (0,) * 4


def test_load_is_that_of_the_last_step() -> None:
    meter = LoadMeter()
    meter.step(step(1, num_running=9, num_waiting=9, num_blocks=8))
    meter.step(step(0, num_running=2, num_waiting=3, num_blocks=8, num_free_blocks=6))
    load = meter.load()
    assert (load.num_running, load.num_waiting, load.kv_cache_use) == (2, 3, 0.25)


def test_rate_falls_to_nothing_when_nothing_is_generated() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    meter.step(step(5))
    clock.now += WINDOW_S
    assert meter.load().tokens_per_s == pytest.approx(5 / WINDOW_S)
    clock.now += 0.25
    assert meter.load().tokens_per_s == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=40))
def test_rate_counts_the_tokens_of_the_window(steps: list[tuple[int, int]]) -> None:
    clock, made = Clock(), []
    meter = LoadMeter(clock)
    for eighths, num_tokens in steps:
        clock.now += eighths / 8
        made.append((clock.now, num_tokens))
        meter.step(step(num_tokens))
    recent = sum(count for when, count in made if when >= clock.now - WINDOW_S)
    assert meter.load().tokens_per_s == recent / WINDOW_S
