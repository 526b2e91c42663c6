"""When the ranks of an engine have to end: one is lost, or none gets on."""

from __future__ import annotations

from multiprocessing import Pipe
from multiprocessing.connection import Connection

from engine.ranks.watch import SILENCE_S, Signs, reason_to_end


def _rank(number: int = 1) -> tuple[Signs, Connection]:
    """A rank's signs, and where it gives them."""
    read, write = Pipe(duplex=False)
    return Signs(number, read), write


def test_ranks_that_say_that_they_get_on_need_not_end() -> None:
    signs, rank = _rank()
    for _ in range(20):
        rank.send(0.0)
        signs.read(SILENCE_S / 2)
        assert not reason_to_end([signs], 0.0, serving=True)


def test_a_rank_that_says_nothing_is_frozen_once_all_serve() -> None:
    signs, rank = _rank(3)
    for _ in range(4):
        signs.read(SILENCE_S / 3)
    assert not reason_to_end([signs], 0.0, serving=False)
    assert reason_to_end([signs], 0.0, serving=True) == "rank 3 gives no sign of life"
    rank.send(0.0)
    signs.read(SILENCE_S)
    assert not reason_to_end([signs], 0.0, serving=True)


def test_a_rank_may_wait_for_one_that_gets_on_and_not_for_one_that_waits_too() -> None:
    signs, rank = _rank()
    rank.send(60.0)
    signs.read(0.1)
    assert not reason_to_end([signs], 0.0, serving=True)
    assert reason_to_end([signs], SILENCE_S, serving=True) == "the ranks wait for each other"
    assert not reason_to_end([signs], None, serving=True)  # a GPU is at work
    assert not reason_to_end([signs], SILENCE_S, serving=False)  # one may download the model


def test_of_several_ranks_one_that_gets_on_is_enough() -> None:
    (stuck, one), (busy, other) = _rank(1), _rank(2)
    one.send(9.0)
    other.send(0.0)
    stuck.read(0.1)
    busy.read(0.1)
    assert not reason_to_end([stuck, busy], 9.0, serving=True)


def test_a_rank_that_has_ended_is_named_with_its_reason() -> None:
    signs, rank = _rank(2)
    rank.send("no memory")
    signs.read(0.1)
    assert reason_to_end([signs], 0.0, serving=False) == "rank 2: no memory"
    rank.close()
    signs.read(0.1)
    assert reason_to_end([signs], 0.0, serving=False) == "rank 2 has ended: no memory"
    killed, rank = _rank(1)
    rank.close()
    killed.read(0.1)
    assert reason_to_end([killed], 0.0, serving=False) == "rank 1 has ended"
