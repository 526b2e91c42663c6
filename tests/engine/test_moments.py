"""What the engine tells of when a request was started, preempted and finished."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.protocol import wire
from engine.protocol.request import Moment, MomentKind, Request
from tests.engine.fakes import make_engine, make_request
from tests.engine.sockets import Client, running_servers

STARTED, PREEMPTED, RESUMED = MomentKind.STARTED, MomentKind.PREEMPTED, MomentKind.RESUMED
FIRST_TOKEN, FINISHED = MomentKind.FIRST_TOKEN, MomentKind.FINISHED

pytestmark = pytest.mark.usefixtures("runs_ahead")


def moments_of(engine: Engine, *requests: Request) -> dict[str, list[Moment]]:
    """Runs requests to their ends; returns what the steps told of each."""
    told: defaultdict[str, list[Moment]] = defaultdict(list)
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for moment in engine.step().moments:
            told[moment.request_id].append(moment)
    return told


def kinds(moments: list[Moment]) -> list[MomentKind]:
    return [moment.kind for moment in moments]


def test_a_request_starts_speaks_and_finishes_once_at_rising_times() -> None:
    before = time.monotonic()
    told = moments_of(make_engine(), make_request())["r"]
    assert kinds(told) == [STARTED, FIRST_TOKEN, FINISHED]
    times = [before, *(moment.at for moment in told), time.monotonic()]
    assert times == sorted(times)


def test_a_prompt_in_pieces_has_one_first_token() -> None:
    engine = make_engine(max_step_tokens=4)
    told = moments_of(engine, make_request(prompt=tuple(range(1, 20))))["r"]
    assert kinds(told) == [STARTED, FIRST_TOKEN, FINISHED]


def test_whoever_gives_way_is_told_of_and_when_it_goes_on() -> None:
    engine = make_engine(num_blocks=8)
    requests = [make_request(name, max_new_tokens=22) for name in ("old", "young")]
    told = moments_of(engine, *requests)
    assert kinds(told["old"]) == [STARTED, FIRST_TOKEN, FINISHED]
    assert kinds(told["young"])[:4] == [STARTED, FIRST_TOKEN, PREEMPTED, RESUMED]
    assert kinds(told["young"])[-1] is FINISHED


def test_what_an_earlier_engine_has_generated_is_no_first_token() -> None:
    told = moments_of(make_engine(), make_request(resumed_token_ids=(4, 5)))["r"]
    assert kinds(told) == [STARTED, FIRST_TOKEN, FINISHED]


def test_an_aborted_request_does_not_finish() -> None:
    engine = make_engine()
    engine.add(make_request(max_new_tokens=50))
    told = kinds([*engine.step().moments, *engine.step().moments])
    engine.abort("r")
    while engine.has_work:
        told += kinds([*engine.step().moments])
    assert told == [STARTED, FIRST_TOKEN]


def test_each_service_is_told_of_its_own_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.sock"
    with running_servers(path, monkeypatch) as serve:
        serve(make_engine())
        with Client(path) as one, Client(path) as other:
            told = {}
            for client, name in ((one, "a"), (other, "b")):
                client.send(wire.submit(make_request(name)))
            for client, name in ((one, "a"), (other, "b")):
                steps = [client.step()]
                while not any(output.is_last for output in steps[-1].outputs):
                    steps.append(client.step())
                told[name] = [moment for step in steps for moment in step.moments]
    for name, moments in told.items():
        assert {moment.request_id for moment in moments} == {name}
        assert kinds(moments) == [STARTED, FIRST_TOKEN, FINISHED]
