"""What a row costs is learned from steps, for each size of batch, and forgotten in time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.step_costs import StepCosts


@given(st.floats(1e-3, 1.0), st.floats(0.0, 0.1), st.integers(1, 64))
def test_the_share_of_a_row_is_that_of_the_line_the_steps_lie_on(
    base: float, slope: float, num_seqs: int
) -> None:
    costs = StepCosts()
    for number in range(40):
        rows = num_seqs * (1 + number % 5)
        costs.observe(num_seqs, rows, base + slope * rows)
    expected = slope / (base + slope * num_seqs)
    assert costs.row_share(num_seqs) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_sizes_of_batches_have_costs_of_their_own() -> None:
    costs = StepCosts()
    for number in range(40):
        costs.observe(1, 1 + number % 6, 1.0)
        costs.observe(8, 8 * (1 + number % 6), 1.0 * (1 + number % 6))
    assert costs.row_share(1) == pytest.approx(0)
    assert costs.row_share(8) == pytest.approx(1 / 8)
    assert costs.row_share(9) == pytest.approx(1 / 9)  # about as many
    assert costs.row_share(64) == 0  # not known


def test_steps_of_one_size_tell_nothing_and_make_earlier_ones_forgotten() -> None:
    costs = StepCosts()
    for rows in (8, 16, 24, 32, 40, 48):
        costs.observe(8, rows, float(rows))
    assert costs.row_share(8) > 0
    for _ in range(1000):
        costs.observe(8, 8, 8.0)
    assert costs.row_share(8) == 0


def test_a_step_that_was_disturbed_is_not_believed() -> None:
    costs = StepCosts()
    for number in range(100):
        costs.observe(4, 4 * (1 + number % 4), 1.0)
    costs.observe(4, 16, 1000.0)
    assert costs.row_share(4) < 0.1
