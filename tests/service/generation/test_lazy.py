"""Lists whose items are made when they are read."""

from __future__ import annotations

from service.generation.lazy import Lazy


def test_items_are_those_that_a_list_would_have() -> None:
    made = Lazy(str, range(3, 7))
    assert list(made) == ["3", "4", "5", "6"]
    assert (len(made), made[0], made[-1], list(made[1:3])) == (4, "3", "6", ["4", "5"])


def test_no_item_is_made_before_it_is_read() -> None:
    read: list[int] = []
    made = Lazy(read.append, range(1000))
    assert len(made) == 1000
    assert not read
    made[7]
    assert read == [7]


def test_values_are_freed_where_nothing_reads_them_any_more() -> None:
    values = list(range(1000))
    Lazy(str, values).release()
    assert not values
    Lazy(str, range(1000)).release()
