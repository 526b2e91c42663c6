"""Which adapter a name means, and which names are errors."""

from __future__ import annotations

import pytest

from engine.protocol.adapters import AdapterInfo
from service.errors import ErrorKind, ServiceError
from service.generation.adapters import Adapters

NAMES = ("pirate", "org/poet")
LISTED = {name: AdapterInfo(name, f"/{name}", f"digest of {name}", 4) for name in NAMES}
SERVED = Adapters(lambda: LISTED, "/models/base")
TGI = Adapters(lambda: LISTED, "/models/base", unknown_is_base=True)
NONE = Adapters(dict, "/models/base")
NONE_YET = Adapters(dict, "/models/base", may_change=True)


@pytest.mark.parametrize("is_model", [False, True])
@pytest.mark.parametrize("adapters", [SERVED, TGI], ids=["refuse", "base"])
def test_an_adapter_is_found_by_its_name(adapters: Adapters, is_model: bool) -> None:
    assert [adapters.find(name, is_model=is_model) for name in NAMES] == [
        f"digest of {name}" for name in NAMES
    ]


@pytest.mark.parametrize("adapters", [SERVED, TGI, NONE], ids=["refuse", "base", "none"])
@pytest.mark.parametrize("name", [None, ""])
def test_no_name_means_the_model(adapters: Adapters, name: str | None) -> None:
    assert adapters.find(name, is_model=False) == adapters.find(name, is_model=True) == ""


@pytest.mark.parametrize("name", ["tgi", "/models/base", "models/base"])
def test_the_model_has_names_of_its_own(name: str) -> None:
    assert SERVED.find(name, is_model=True) == ""


@pytest.mark.parametrize(
    ("adapters", "name", "is_model"),
    [
        (SERVED, "Pirate", False),
        (SERVED, "Pirate", True),
        (SERVED, "poet", True),
        (SERVED, "tgi", False),
        (SERVED, "/models/base", False),
        (NONE, "pirate", False),
        (NONE_YET, "pirate", True),  # it was unloaded, perhaps
    ],
)
def test_other_names_are_errors(adapters: Adapters, name: str, is_model: bool) -> None:
    with pytest.raises(ServiceError, match=f"The adapter `{name}` does not exist") as refused:
        adapters.find(name, is_model=is_model)
    error = refused.value
    assert (error.kind, error.field) == (ErrorKind.NOT_FOUND, "parameters.adapter_id")
    assert error.code == "model_not_found"


def test_an_error_repeats_no_long_name() -> None:
    with pytest.raises(ServiceError) as refused:
        SERVED.find("x" * 100_000, is_model=False)
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("is_model", [False, True])
def test_other_names_mean_the_model_by_the_rule_of_tgi(is_model: bool) -> None:
    assert TGI.find("gpt-4o", is_model=is_model) == ""


@pytest.mark.parametrize("name", ["gpt-4o", "tgi", "pirate"])
def test_without_adapters_every_name_of_a_model_is_the_models(name: str) -> None:
    assert NONE.find(name, is_model=True) == ""


def test_adapters_may_come_and_go() -> None:
    served: dict[str, AdapterInfo] = {}
    adapters = Adapters(lambda: served, "/models/base", may_change=True)
    assert adapters.names == ()
    served["new"] = AdapterInfo("new", "/new", "00", 1)
    assert adapters.names == ("new",)
    assert adapters.find("new", is_model=True) == "00"
