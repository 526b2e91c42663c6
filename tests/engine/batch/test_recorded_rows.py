"""Batches of fixed size and address, and parts of them."""

from __future__ import annotations

import pytest
import torch

from engine.batch.integers import integers_of
from engine.batch.recorded_rows import TableWidths, blank, first_rows

WIDTHS = [TableWidths(3), TableWidths(3, 5, 8)]


@pytest.mark.parametrize("widths", WIDTHS, ids=["plain", "with windows"])
def test_first_rows_have_the_shapes_of_a_smaller_batch_and_the_memory_of_the_larger(
    widths: TableWidths,
) -> None:
    device = torch.device("cpu")
    rows = blank(9, 4, 6, widths, device)
    part = first_rows(rows, 5, 2, 3, widths)
    smaller = integers_of(blank(5, 2, 3, widths, device)).present()
    for tensor, alike, whole in zip(
        integers_of(part).present(), smaller, integers_of(rows).present(), strict=True
    ):
        assert tensor.shape == alike.shape
        assert tensor.data_ptr() == whole.data_ptr()
    windows = [it.attention.window for it in (part, rows)]
    assert [window and window.window for window in windows] == [widths.window or None] * 2
