"""The limit on open files: raised as far as possible, and a warning if that is not enough."""

from __future__ import annotations

import resource

import pytest

from service.launch.open_files import raise_limit

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "now", "warns"),
    [
        (1024, 4096, 1256, False),
        (1024, INFINITE, 1256, False),
        (4096, 4096, None, False),
        (INFINITE, INFINITE, None, False),
        (256, 512, 512, True),
        (64, 64, 64, True),
    ],
)
def test_limit(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, now: int | None, warns: bool
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    warning = raise_limit(1000)
    assert limits == ([] if now is None else [(now, hard)])
    expected = f"only {now} files may be open (ulimit -n); 1000 connections need 1256"
    assert warning == (expected if warns else None)
