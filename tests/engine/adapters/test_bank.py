"""Adapters that come and go between the steps of an engine."""

from __future__ import annotations

import queue
from dataclasses import replace
from typing import Any

import pytest

from engine.adapters.loader import Outcome
from engine.adapters.peft_directory import read_adapter
from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.adapters import LoadAdapter
from engine.protocol.config import EngineConfig
from engine.protocol.errors import AdapterError, AdapterFault
from engine.protocol.request import Request, SequenceOutput
from tests.engine.adapters.made import SETTINGS, Made, make, merged_tokens
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import ARCHITECTURES, build_model, make_prompts
from tests.engine.native import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("one_thread")]

NUM_TOKENS = 12
PROMPTS = make_prompts()[1:3]
NAMES = [*SETTINGS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(build_model(ARCHITECTURES["llama"]()), tmp_path_factory.mktemp("bank"), SETTINGS)


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, list[list[int]]]:
    return {name: merged_tokens(made, name, PROMPTS, NUM_TOKENS) for name in ("", *NAMES)}


def engine_for(made: Made, **options: Any) -> Engine:
    engine, info = build_engine(
        EngineConfig(
            model_id=str(made.model),
            socket_path=made.model / "socket",
            device="cpu",
            num_threads=1,
            adapter_directory=made.model.parent,
            block_size=4,
            **{"max_batch_total_tokens": 4096, **options},
        )
    )
    assert info.loads_adapters
    return engine


def load(engine: Engine, name: str, source: str, **options: Any) -> None:
    """Loads an adapter, and waits until it is there."""
    wanted = LoadAdapter(name=name, source=source, **options)
    read: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    assert engine.adapters is not None
    engine.adapters.begin(wanted, read.put)
    engine.adapters.finish(wanted, read.get(timeout=60))


def digest(made: Made, name: str) -> str:
    return "" if not name else read_adapter(name, str(made.adapters[name])).digest.hex()


def request(made: Made, adapter: str, index: int) -> Request:
    return Request(
        request_id=f"{adapter} {index}",
        prompt_token_ids=PROMPTS[index],
        max_new_tokens=NUM_TOKENS,
        adapter=digest(made, adapter),
    )


def tokens(engine: Engine, made: Made, *names: str) -> dict[str, list[list[int]]]:
    indices = range(len(PROMPTS))
    outputs = run(engine, *(request(made, name, index) for name in names for index in indices))
    return {name: [token_ids(outputs[f"{name} {index}"]) for index in indices] for name in names}


@pytest.mark.parametrize("options", [{}, {"enable_native_kernels": False}], ids=str)
def test_adapters_that_come_later_have_their_merged_models_tokens(
    made: Made, expected: dict[str, list[list[int]]], options: dict[str, Any]
) -> None:
    """Also in steps that were recorded before they came, and behind one of a lower rank."""
    engine = engine_for(made, **options)
    present = [""]
    for name in ("everything", "attention", "patterns", "stable"):
        assert tokens(engine, made, *present) == {one: expected[one] for one in present}
        load(engine, name, name)
        present.append(name)
    assert tokens(engine, made, *present) == expected
    assert engine.adapters is not None
    for name in NAMES:
        engine.adapters.remove(name)
        assert not engine.adapters.has(digest(made, name))
    assert tokens(engine, made, "") == {"": expected[""]}
    load(engine, "again", "stable")
    assert tokens(engine, made, "", "stable") == {one: expected[one] for one in ("", "stable")}


def test_one_that_is_replaced_stays_until_its_last_request_has_ended(
    made: Made, expected: dict[str, list[list[int]]]
) -> None:
    engine = engine_for(made, max_loras=2)
    load(engine, "name", "stable")
    assert engine.add(request(made, "stable", 0)) is None
    outputs: list[SequenceOutput] = [*engine.step().outputs]
    load(engine, "name", "patterns", replaces=True)
    assert engine.add(request(made, "patterns", 0)) is None
    assert engine.adapters is not None
    assert [one.digest for one in engine.adapters.listed()] == [digest(made, "patterns")]
    assert engine.adapters.has(digest(made, "stable"))
    while engine.has_work:
        outputs += engine.step().outputs
    for name in ("stable", "patterns"):
        own = [output for output in outputs if output.request_id == f"{name} 0"]
        assert token_ids(own) == expected[name][0]
    assert not engine.adapters.has(digest(made, "stable"))
    refused = engine.add(request(made, "stable", 1))
    assert refused is not None
    assert refused.error == "the adapter is not loaded any more"


def test_one_that_is_aborted_frees_its_adapter(made: Made) -> None:
    engine = engine_for(made)
    load(engine, "name", "stable")
    assert engine.add(request(made, "stable", 0)) is None
    engine.step()
    assert engine.adapters is not None
    engine.adapters.remove("name")
    assert engine.adapters.has(digest(made, "stable"))
    engine.abort("stable 0")
    assert not engine.adapters.has(digest(made, "stable"))


def test_two_names_of_the_same_files(made: Made, expected: dict[str, list[list[int]]]) -> None:
    engine = engine_for(made)
    load(engine, "one", "stable")
    load(engine, "two", str(made.adapters["stable"]))
    assert engine.adapters is not None
    engine.adapters.remove("one")
    assert tokens(engine, made, "stable") == {"stable": expected["stable"]}


@pytest.mark.parametrize(
    ("name", "source", "options", "fault"),
    [
        ("name", "patterns", {}, AdapterFault.LOADED),
        ("other", "patterns", {}, AdapterFault.TOO_MANY),
        ("name", "none", {"replaces": True}, AdapterFault.MISSING),
        ("name", "..", {"replaces": True}, AdapterFault.FORBIDDEN),
        ("name", "model", {"replaces": True}, AdapterFault.INVALID),
        ("name", "patterns", {"replaces": True, "digest": "00" * 32}, AdapterFault.INVALID),
    ],
)
def test_what_is_refused_changes_nothing(
    made: Made, name: str, source: str, options: dict[str, Any], fault: AdapterFault
) -> None:
    engine = engine_for(made, max_cpu_loras=1)
    load(engine, "name", "stable")
    assert engine.adapters is not None
    before = engine.adapters.listed()
    with pytest.raises(AdapterError) as refused:
        load(engine, name, source, **options)
    assert refused.value.fault is fault
    assert engine.adapters.listed() == before
    with pytest.raises(AdapterError):
        engine.adapters.remove("nobody")


def test_a_request_waits_for_an_adapter_that_comes_back(made: Made) -> None:
    engine = engine_for(made)
    wanted = LoadAdapter(name="name", source="stable", digest=digest(made, "stable"))
    read: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    woken: list[str] = []
    assert engine.adapters is not None
    engine.adapters.begin(wanted, read.put)
    assert engine.adapters.is_coming(wanted)
    assert not engine.adapters.is_coming(replace(wanted, digest="0" * 64))
    assert engine.prepare(request(made, "", 0), lambda: woken.append("base"))
    assert not engine.prepare(request(made, "stable", 0), lambda: woken.append("stable"))
    engine.adapters.finish(wanted, read.get(timeout=60))
    assert woken == ["stable"]
    assert engine.prepare(request(made, "stable", 0), lambda: None)
