"""The engine's load: its last step, and tokens per second over a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.request import EngineStats, StepOutput
from service.generation.load import WINDOW_S, LoadMeter


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """An engine whose tokens are those of any service, and its meter."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.meter = LoadMeter(self.clock)
        self.num_tokens = 1000  # before the meter was there
        self.step(0)

    def step(self, num_tokens: int) -> None:
        """A step that gives so many sequences a token."""
        self.num_tokens += num_tokens
        self.meter.step(step(num_generated_tokens=self.num_tokens))


def step(**stats: int) -> StepOutput:
    """A step with these figures of the engine."""
    return StepOutput(stats=EngineStats(**stats))


def test_load_before_the_first_step_is_nothing() -> None:
    load = LoadMeter().load()
    assert (load.num_running, load.num_waiting, load.kv_cache_use, load.tokens_per_s) == (0,) * 4


def test_load_is_that_of_the_last_step() -> None:
    meter = LoadMeter()
    meter.step(step(num_running=9, num_waiting=9, num_blocks=8))
    meter.step(step(num_running=2, num_waiting=3, num_blocks=8, num_free_blocks=6))
    load = meter.load()
    assert (load.num_running, load.num_waiting, load.kv_cache_use) == (2, 3, 0.25)


def test_share_of_replayed_steps_is_that_of_all_engines_since_their_start() -> None:
    meter = LoadMeter()
    assert meter.load().replayed_share is None
    meter.step(step())
    assert meter.load().replayed_share is None, "an engine that has computed nothing"
    meter.step(step(num_steps=6), engine=1)
    assert meter.load().replayed_share == 0.0
    meter.step(step(num_steps=10, num_replayed_steps=8), engine=2)
    assert meter.load().replayed_share == 0.5


def test_rate_falls_to_nothing_when_nothing_is_generated() -> None:
    engine = Engine()
    engine.step(5)
    engine.clock.now += WINDOW_S
    assert engine.meter.load().tokens_per_s == pytest.approx(5 / WINDOW_S)
    engine.clock.now += 0.25
    assert engine.meter.load().tokens_per_s == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=40))
def test_rate_counts_the_tokens_of_the_window(steps: list[tuple[int, int]]) -> None:
    engine, made = Engine(), []
    for eighths, num_tokens in steps:
        engine.clock.now += eighths / 8
        made.append((engine.clock.now, num_tokens))
        engine.step(num_tokens)
    recent = sum(count for when, count in made if when >= engine.clock.now - WINDOW_S)
    assert engine.meter.load().tokens_per_s == recent / WINDOW_S


def test_a_new_engine_counts_from_nothing() -> None:
    engine = Engine()
    engine.num_tokens = 0
    engine.step(7)
    assert engine.meter.load().tokens_per_s == pytest.approx(7 / WINDOW_S)
