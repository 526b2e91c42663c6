"""The processors that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.protocol import processors

_ALL = os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("max 100000", len(_ALL)),
        ("100000 100000", 1),
        ("1000 100000", 1),
        ("150000 100000", min(2, len(_ALL))),
        (f"{100_000 * 10_000} 100000", len(_ALL)),
        ("", len(_ALL)),
    ],
)
def test_a_containers_quota_bounds_the_threads(
    cpu_max: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(cpu_max)
    monkeypatch.setattr(processors, "_CPU_MAX", path)
    assert processors.num_processors() == expected


def test_without_a_quota_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_CPU_MAX", tmp_path / "absent")
    assert processors.num_processors() == len(_ALL)
