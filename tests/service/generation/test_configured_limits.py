"""Limits of settings and of the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.generation.configured_limits import make_limits
from service.launch.settings import Settings
from tests.service.fakes import INFO


def test_limits_follow_the_engine() -> None:
    limits = make_limits(Settings(), INFO)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (200, 199)


def test_limits_may_be_lower() -> None:
    limits = make_limits(Settings(max_total_tokens=100, max_input_tokens=10), INFO)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (100, 10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Settings(max_total_tokens=201), "max_total_tokens must be <= 200"),
        (Settings(max_input_tokens=200), "max_input_tokens must be < max_total_tokens"),
    ],
    ids=["total", "input"],
)
def test_limits_above_those_of_the_engine_are_refused(settings: Settings, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_limits(settings, INFO)
    make_limits(settings, replace(INFO, max_total_tokens=300))
