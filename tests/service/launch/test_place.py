"""How a service process learns which of several it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.launch.place import VARIABLE, Place, own_place


@pytest.mark.parametrize("place", [Place(1, 2, Path("/run/a")), Place(12, 64, Path("/a:b/c d"))])
def test_a_child_reads_the_place_that_it_was_given(place: Place) -> None:
    assert own_place(place.environment) == place


def test_the_only_service_process_has_no_place() -> None:
    assert own_place({}) is None


@pytest.mark.parametrize("text", ["2", "1/2", "a/b:/run", "1/2:", "-1/2:/run"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="TOKENWIRE_SIBLINGS"):
        own_place({VARIABLE: text})


def test_the_others_are_all_but_oneself() -> None:
    assert Place(2, 4, Path("/run")).others == (1, 3, 4)
