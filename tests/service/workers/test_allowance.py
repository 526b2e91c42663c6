"""An allowance is that of any time of its length."""

from __future__ import annotations

from service.workers.allowance import Allowance


def test_bytes_come_back_after_their_time() -> None:
    now = 0.0
    allowance = Allowance(100, 60.0, lambda: now)
    assert allowance.take(40)
    now = 30.0
    assert allowance.take(60)
    assert not allowance.take(1)
    now = 59.9
    assert not allowance.take(1)
    now = 60.0
    assert allowance.take(40)
    assert not allowance.take(1)
    now = 90.0
    assert allowance.take(60)


def test_what_is_refused_takes_nothing() -> None:
    allowance = Allowance(100, 60.0, lambda: 0.0)
    assert not allowance.take(101)
    assert allowance.take(100)
