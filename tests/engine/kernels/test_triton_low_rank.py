"""Low-rank updates by the Triton kernel against torch in double precision.

It runs on a GPU where there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.adapters.adapter import LowRankUpdate
from engine.adapters.low_rank import AdaptedRows, Place
from engine.adapters.segmented_updates import Capacity, SegmentedUpdates, segmented_agrees
from engine.kernels.row_tiles import TILE_ROWS, RowTiles
from tests.engine.on_device import DEVICE, INTERPRETED

pytest.importorskip("triton")

from engine.kernels import triton_low_rank

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.usefixtures("one_thread", "dots_of_bfloat16"),
]

NUM_SLOTS = 5
RANKS = {0: 1, 1: 16, 2: 17, 4: 70}  # slot 3 has no update
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@settings(max_examples=60)
@given(slots=st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=1, max_size=90))
def test_every_row_with_a_slot_is_in_one_tile_of_it(slots: list[int]) -> None:
    found = RowTiles.of(torch.tensor(slots), NUM_SLOTS)
    rows: list[int] = []
    for first, size, slot in found.tiles.tolist():
        assert 0 <= size <= TILE_ROWS
        tile = found.order[first : first + size].tolist()
        assert all(slots[row] == slot for row in tile)
        rows += tile
    assert sorted(rows) == [row for row, slot in enumerate(slots) if slot >= 0]


@dataclass(frozen=True)
class Made:
    """Updates of a layer of zeros, and the same as whole matrices by slot in double precision."""

    updates: SegmentedUpdates
    capacity: Capacity
    whole: dict[int, Tensor]

    def add(self, x: Tensor, y: Tensor, slots: list[int]) -> Tensor:
        """The rows of y with their updates."""
        here = y.to(DEVICE)
        rows = AdaptedRows(len(x), None, torch.tensor(slots, device=DEVICE))
        layer = nn.Identity()
        layer.forward = lambda _: here  # type: ignore[method-assign, assignment]
        return self.updates(layer, x.to(DEVICE), rows).cpu()

    def put(self, slot: int, rank: int) -> None:
        """Fills a slot; the first one has no update of a second part."""
        for index, part in enumerate(self.updates.parts):
            down = torch.randn(rank, part.in_features) / part.in_features**0.5
            up = torch.randn(part.out_features, rank)
            if index == 1 and slot == 0:
                continue
            packed = part.pack(LowRankUpdate(down, up))
            part.reserve(len(packed[0]))
            part.put(slot, packed)
            matrix = packed[1].double().cpu() @ packed[0].double().cpu()
            self.whole[slot][part.first : part.first + part.out_features] = matrix


def make(k: int, parts: list[int], dtype: torch.dtype, ranks: dict[int, int] = RANKS) -> Made:
    places = [Place(sum(parts[:index]), n, k) for index, n in enumerate(parts)]
    capacity = Capacity()
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    updates = SegmentedUpdates(like, NUM_SLOTS, places, capacity)
    whole = {slot: torch.zeros(sum(parts), k, dtype=torch.float64) for slot in range(NUM_SLOTS)}
    made = Made(updates, capacity, whole)
    for slot, rank in ranks.items():
        made.put(slot, rank)
    return made


def expected(made: Made, x: Tensor, y: Tensor, slots: list[int]) -> Tensor:
    rows = zip(y.double(), x.double(), slots, strict=True)
    return torch.stack([old + made.whole[s] @ row if s >= 0 else old for old, row, s in rows])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "parts"),
    [(1, 1, [1]), (7, 64, [31, 50]), (40, 129, [100, 1, 63]), (5, 1100, [96])],
)
def test_updates_equal_torch(dtype: torch.dtype, rows: int, k: int, parts: list[int]) -> None:
    torch.manual_seed(rows)
    made = make(k, parts, dtype)
    x, y = torch.randn(rows, k).to(dtype), torch.randn(rows, sum(parts)).to(dtype)
    slots = torch.randint(-1, NUM_SLOTS, (rows,)).tolist()
    found = made.add(x, y.clone(), slots)
    wanted = expected(made, x, y, slots)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= TOLERANCE[dtype]
    untouched = [slot in (-1, 3) for slot in slots]
    assert torch.equal(found[untouched], y[untouched])


def test_a_row_depends_on_no_other() -> None:
    torch.manual_seed(0)
    made = make(200, [60, 40], torch.float32, {0: 16, 1: 3})
    x, y = torch.randn(37, 200), torch.randn(37, 100)
    slots = [0, 1, -1, 0] * 9 + [0]
    together = made.add(x, y.clone(), slots)
    for some in ([20, 3, 4, 7, 0], [36], [1, 2]):
        alone = made.add(x[some], y[some], [slots[row] for row in some])
        # The interpreter multiplies with a library whose order of sums depends on the row.
        tolerance = 3e-5 if INTERPRETED else 0.0
        torch.testing.assert_close(alone, together[some], atol=tolerance, rtol=tolerance)


def test_a_larger_rank_moves_the_others_and_keeps_the_table() -> None:
    torch.manual_seed(0)
    made = make(48, [40, 24], torch.float32, {0: 4, 1: 20})
    address, room = made.updates._table.data_ptr(), made.capacity.rank
    x, y, slots = torch.randn(9, 48), torch.randn(9, 64), [0, 1, 2] * 3
    before = made.add(x, y.clone(), slots)
    assert made.capacity.rank == room  # so that recorded steps stay
    made.put(2, 90)
    assert made.capacity.rank == 96
    assert made.updates._table.data_ptr() == address
    after = made.add(x, y.clone(), slots)
    assert torch.equal(after[[0, 1, 3, 4, 6, 7]], before[[0, 1, 3, 4, 6, 7]])
    wanted = expected(made, x, y, slots)
    torch.testing.assert_close(after.double(), wanted, atol=3e-5, rtol=3e-5)


def test_an_emptied_slot_adds_nothing() -> None:
    made = make(8, [10], torch.float32, {0: 4, 1: 4})
    made.updates.parts[0].put(0, None)
    y = made.add(torch.randn(3, 8), torch.zeros(3, 10), [0, 1, -1])
    assert not y[::2].any()
    assert y[1].all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_start_compares_the_kernel_with_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    assert segmented_agrees(like)
    monkeypatch.setattr(triton_low_rank, "add_updates", lambda _x, y, *_: y.mul_(1.01))
    assert not segmented_agrees(like)
    assert "off by" in caplog.text

    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_low_rank, "add_updates", fails)
    assert not segmented_agrees(like)
    assert "no compiler" in caplog.text
