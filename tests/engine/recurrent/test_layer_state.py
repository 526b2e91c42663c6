"""States are where they were put, and take the memory that was counted."""

from __future__ import annotations

import torch

from engine.recurrent.layer_state import LayerState, StatePool, StateShape, bytes_per_slot
from tests.engine.fakes import CPU

LAYERS = {
    1: LayerState(conv={0: StateShape((6, 4), torch.float32)}, recurrent={}),
    4: LayerState(
        conv={0: StateShape((2, 3), torch.bfloat16)},
        recurrent={0: StateShape((2, 5, 5), torch.float32)},
    ),
}


def test_a_slot_takes_the_bytes_of_all_its_tensors() -> None:
    assert bytes_per_slot(LAYERS) == 6 * 4 * 4 + 2 * 3 * 2 + 2 * 5 * 5 * 4


def test_what_is_written_into_one_slot_is_in_that_slot_alone() -> None:
    pool = StatePool(LAYERS, 3, CPU)
    pool.at(4, 1).recurrent[0].fill_(7)
    states = pool.gather(4, torch.tensor([2, 1, 0])).recurrent[0]
    assert states.flatten(1).sum(1).tolist() == [0, 7 * 50, 0]


def test_copies_are_put_back_in_their_order() -> None:
    pool = StatePool(LAYERS, 3, CPU)
    slots = torch.tensor([2, 0])
    copies = pool.gather(1, slots)
    copies.conv[0].add_(torch.tensor([5.0, 6.0]).view(2, 1, 1))
    assert float(pool.at(1, 2).conv[0].sum()) == 0
    pool.scatter(1, slots, copies)
    assert [float(pool.at(1, slot).conv[0].mean()) for slot in range(3)] == [6, 0, 5]
