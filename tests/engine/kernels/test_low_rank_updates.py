"""Low-rank updates by the C kernel against torch in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels import cpu
from engine.kernels.cpu import CpuKernels
from engine.kernels.cpu_low_rank import Updates
from tests.engine.native import needs_compiler, threads

pytestmark = needs_compiler

NUM_SLOTS = 5
RANKS = {0: 1, 1: 16, 2: 17, 4: 70}  # slot 3 has no update


@dataclass(frozen=True)
class Made:
    """Updates, and the same as whole matrices by slot, in double precision."""

    updates: Updates
    whole: dict[int, Tensor]


def make(
    kernels: CpuKernels,
    k: int,
    parts: list[int],
    ranks: dict[int, int],
    dtype: torch.dtype = torch.float32,
) -> Made:
    """Updates of a layer of several parts, of numbers of a format; slot 0 of the second has none.

    The kernel stores matrices in that format, if it is one of 16 bits.
    """
    firsts = [sum(parts[:index]) for index in range(len(parts))]
    updates = Updates([*zip(firsts, parts, strict=True)], NUM_SLOTS)
    whole = {}
    for slot, rank in ranks.items():
        matrix = torch.zeros(sum(parts), k, dtype=torch.float64)
        for index, (first, n) in enumerate(zip(firsts, parts, strict=True)):
            down, up = torch.randn(rank, k) / k**0.5, torch.randn(n, rank)
            down, up = down.to(dtype).float(), up.to(dtype).float()
            if index == 1 and slot == 0:
                continue
            packed = kernels.pack_update(down, up)
            assert packed.down.dtype == packed.up.dtype == dtype
            updates.put(index, slot, packed)
            matrix[first : first + n] = up.double() @ down.double()
        whole[slot] = matrix
    return Made(updates, whole)


def expected(made: Made, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    """The rows of y with their updates."""
    nothing = torch.zeros_like(next(iter(made.whole.values())))
    rows = [
        row.double() + made.whole.get(slot, nothing) @ given.double()
        for row, given, slot in zip(y, x, slots.tolist(), strict=True)
    ]
    return torch.stack(rows).float()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "k", "parts"),
    [
        (1, 1, [1]),
        (2, 33, [40]),
        (7, 64, [31, 50]),
        (32, 256, [344, 344]),
        (400, 129, [100, 1, 63]),
        (5, 1025, [96]),
    ],
)
def test_updates_equal_torch(
    kernels: CpuKernels, rows: int, k: int, parts: list[int], num_threads: int
) -> None:
    torch.manual_seed(rows)
    made = make(kernels, k, parts, RANKS)
    x, y = torch.randn(rows, k), torch.randn(rows, sum(parts))
    slots = torch.randint(-1, NUM_SLOTS, (rows,))
    found = y.clone()
    with threads(num_threads):
        kernels.add_updates(x, found, slots, made.updates)
    torch.testing.assert_close(found, expected(made, x, y, slots), atol=3e-5, rtol=3e-5)
    untouched = [slot not in made.whole for slot in slots.tolist()]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_updates_in_16_bits_are_those_in_32_bit_for_bit(
    kernels: CpuKernels,
    narrow_kernels: CpuKernels,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    is_narrow: bool,
) -> None:
    tested = narrow_kernels if is_narrow else kernels
    found = []
    for stored in (dtype, torch.float32):
        torch.manual_seed(1)
        if stored is torch.float32:
            monkeypatch.setattr(cpu, "exact_dtype", lambda *_: torch.float32)
        updates = Updates([(0, 41), (41, 30)], NUM_SLOTS)
        for slot, rank in RANKS.items():
            for part, n in enumerate([41, 30]):
                down, up = torch.randn(rank, 77), torch.randn(n, rank)
                down[0, :4] = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-15)])  # some subnormal
                packed = tested.pack_update(down.to(dtype).float(), up.to(dtype).float())
                assert packed.down.dtype is stored
                updates.put(part, slot, packed)
        x, y = torch.randn(19, 77), torch.randn(19, 71)
        tested.add_updates(x, y, torch.arange(19) % (NUM_SLOTS + 1) - 1, updates)
        found.append(y)
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [1 + 2.0**-12, 2.0**20 + 1, 1e-30])
def test_a_number_that_16_bits_do_not_hold_keeps_32(kernels: CpuKernels, value: float) -> None:
    down, up = torch.zeros(2, 5), torch.ones(3, 2)
    down[1, 4] = value
    assert kernels.pack_update(down, up).down.dtype is torch.float32
    assert kernels.pack_update(up, down.t()).up.dtype is torch.float32


def test_a_row_depends_on_no_other(kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    made = make(kernels, 200, [60, 40], {0: 16, 1: 3})
    x, y = torch.randn(23, 200), torch.randn(23, 100)
    slots = torch.tensor([0, 1, -1] * 7 + [0, 0])

    def compute(rows: list[int]) -> Tensor:
        found = y[rows]
        kernels.add_updates(x[rows], found, slots[rows], made.updates)
        return found

    together = compute([*range(len(x))])
    for row in range(len(x)):
        assert torch.equal(compute([row])[0], together[row])
    some = [20, 3, 4, 7, 0]
    assert torch.equal(compute(some), together[some])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 32, 200])
def test_a_layer_and_its_updates_by_one_call_are_those_by_two(
    kernels: CpuKernels, rows: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.manual_seed(rows)
    k, parts = 520, [90, 30]
    made = make(kernels, k, parts, RANKS, dtype)
    weight = kernels.pack_weight(torch.randn(sum(parts), k).to(dtype))
    x, bias = torch.randn(rows, k), torch.randn(sum(parts))
    for slots in (torch.arange(rows) % (NUM_SLOTS + 1) - 1, torch.full((rows,), -1)):
        with threads(num_threads):
            found = kernels.adapted_linear(x, weight, bias, sum(parts), slots, made.updates)
            wanted = kernels.linear(x, weight, bias, sum(parts))
            kernels.add_updates(x, wanted, slots, made.updates)
        assert torch.equal(found, wanted)


def test_an_update_that_is_taken_away(kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    made = make(kernels, 8, [10], {0: 4, 1: 4})
    x, y = torch.randn(3, 8), torch.zeros(3, 10)
    made.updates.put(0, 0, None)
    kernels.add_updates(x, y, torch.tensor([0, 1, -1]), made.updates)
    assert not y[::2].any()
    assert y[1].all()


def test_a_slot_that_is_not_there(kernels: CpuKernels) -> None:
    made = make(kernels, 8, [10], {0: 1})
    x, slots = torch.zeros(1, 8), torch.tensor([NUM_SLOTS])
    with pytest.raises(IndexError):
        kernels.add_updates(x, torch.zeros(1, 10), slots, made.updates)
    with pytest.raises(IndexError):
        weight = kernels.pack_weight(torch.zeros(10, 8))
        kernels.adapted_linear(x, weight, None, 10, slots, made.updates)
