"""Connections to the engine's socket: garbage, peers that do not read, the end of the server."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgpack
import pytest

from engine.protocol import wire
from engine.protocol.adapters import LoadAdapter
from engine.protocol.errors import AdapterError, AdapterFault, unknown_adapter
from engine.protocol.request import FinishReason, StepOutput
from tests.engine.fakes import greedy_tokens, make_engine, token_ids
from tests.engine.sockets import (
    INFO,
    TIMEOUT_S,
    BigEngine,
    Client,
    Serve,
    make_request,
)


def frame(body: bytes) -> bytes:
    """A frame with any body."""
    return wire.HEADER.pack(len(body)) + body


@pytest.mark.parametrize(
    "garbage",
    [
        frame(b"\xc1"),
        frame(b"\x05"),
        frame(b""),
        frame(msgpack.packb([99])),
        wire.frame(wire.Kind.SUBMIT, "too", "few"),
        wire.frame(wire.Kind.SUBMIT, *[None] * 7),
        wire.frame(wire.Kind.ABORT),
        wire.frame(wire.Kind.ABORT, ["no text"]),
        wire.frame(wire.Kind.ABORT, "one", "too many"),
        wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1),
    ],
)
def test_garbage_closes_its_own_connection_only(serve: Serve, path: Path, garbage: bytes) -> None:
    serve(make_engine())
    with Client(path) as good, Client(path) as bad:
        bad.send(garbage)
        bad.until_closed()
        good.send(wire.submit(make_request()))
        assert token_ids(good.until_ended("r")["r"]) == greedy_tokens((1, 2, 3), 5)


def test_half_a_message_and_a_disconnect_do_not_affect_other_services(
    serve: Serve, path: Path
) -> None:
    serve(make_engine())
    with Client(path) as good:
        with Client(path) as bad:
            bad.send(wire.submit(make_request("half"))[:-3])
        good.send(wire.submit(make_request()))
        assert set(good.until_ended("r")) == {"r"}


def test_an_idle_engine_sends_heartbeats(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        assert [client.step().outputs for _ in range(3)] == [()] * 3


def test_each_step_is_counted_by_one_service(serve: Serve, path: Path) -> None:
    """The longest connected one, whoever the tokens are for; and the next one when it leaves."""
    server = serve(make_engine())
    with Client(path) as oldest:
        oldest.step()
        with Client(path) as other:
            for number, asking in enumerate((oldest, other), 1):
                asking.send(wire.submit(make_request(str(number))))
                told, untold = (_until_generated(client, 5 * number) for client in (oldest, other))
                assert _num_counted(told) == 5
                assert _num_counted(untold) == 0
                assert told[-1].stats == untold[-1].stats
            oldest.close()
            while len(server._connections) > 1:
                other.step()
            other.send(wire.submit(make_request("3")))
            assert _num_counted(_until_generated(other, 15)) == 5


def test_callers_of_two_services_take_turns(serve: Serve, path: Path) -> None:
    """One caller's third request waits for the only one of another caller, who came last."""
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate, max_num_seqs=1))
    with Client(path) as greedy, Client(path) as modest:
        modest.step()  # it is connected, so it is told of every step from now on
        for request_id in ("1", "2", "3"):
            greedy.send(wire.submit(make_request(request_id, max_new_tokens=20, caller="greedy")))
        modest.send(wire.submit(make_request("m", max_new_tokens=5, caller="modest")))
        gate.release()
        while modest.step().stats.num_waiting < 3:
            gate.release()
        gate.release(200)
        step = modest.step()
        while not any(output.is_last for output in step.outputs):
            step = modest.step()
        assert step.stats.num_generated_tokens <= 20 + 20 + 5
        assert set(greedy.until_ended("1", "2", "3")) == {"1", "2", "3"}


def _until_generated(client: Client, count: int) -> list[StepOutput]:
    """The steps until the engine has generated so many tokens in all."""
    steps = [client.step()]
    while steps[-1].stats.num_generated_tokens < count:
        steps.append(client.step())
    return steps


def _num_counted(steps: list[StepOutput]) -> int:
    """The steps whose figures a service was told."""
    return sum(step.num_scheduled_tokens > 0 for step in steps)


def test_the_socket_is_private(serve: Serve, path: Path) -> None:
    serve(make_engine())
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_socket_left_by_a_dead_engine_is_replaced(serve: Serve, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    serve(make_engine())
    with Client(path) as client:
        assert client.read() == INFO


def test_stop_lets_running_requests_finish(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    server = serve(make_engine(gate=gate))
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        gate.release()
        while not (first := client.step().outputs):
            pass
        server.stop()
        gate.release(100)
        steps = client.until_closed()
    outputs = [*first, *(output for step in steps for output in step.outputs)]
    assert token_ids(outputs) == greedy_tokens((1, 2, 3), 5)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_what_comes_after_an_engine_has_said_that_it_leaves_is_left_to_others(
    serve: Serve, path: Path
) -> None:
    gate = threading.Semaphore(0)
    server = serve(make_engine(gate=gate))
    with Client(path) as client:
        client.send(wire.submit(make_request("before")))
        gate.release()
        while not client.step().outputs:
            pass
        server.stop()
        gate.release()
        while client.read() is not wire.Kind.LEAVING:
            pass
        client.send(wire.submit(make_request("after")))
        gate.release(100)
        outputs = [output for step in client.until_closed() for output in step.outputs]
    assert {output.request_id for output in outputs} == {"before"}
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_stop_sends_computed_outputs_before_it_closes(serve: Serve, path: Path) -> None:
    engine = BigEngine()
    server = serve(engine)
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        assert engine.stepped.wait(TIMEOUT_S)
        server.stop()
        outputs = [output for step in client.until_closed() for output in step.outputs]
    assert [output.error for output in outputs] == [engine.text]


def test_a_service_that_does_not_read_is_closed_without_delaying_other_services(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.server._MAX_OUTBOX", 20)
    serve(BigEngine())
    with Client(path) as reads, Client(path) as deaf:
        deaf.send(
            wire.submit(make_request("deaf"))
        )  # fills the socket's buffer; heartbeats queue up
        for index in range(5):
            reads.send(wire.submit(make_request(str(index))))
            assert set(reads.until_ended(str(index))) == {str(index)}
        for _ in range(40):
            assert reads.step().outputs == ()
        assert not any(step.outputs for step in deaf.until_closed()), (
            "its output was not sent completely"
        )


def test_connections_that_end_at_once_are_forgotten(
    path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Thread.start", _start_and_wait_a_turn)
    server = serve(make_engine())
    for _ in range(30):
        Client(path).close()
    with Client(path) as client:
        for _ in range(2000):  # each takes some ms
            client.step()
            if len(server._connections) == 1:
                return
        raise AssertionError(f"{len(server._connections)} connections are kept")


_start = threading.Thread.start


def _start_and_wait_a_turn(thread: threading.Thread) -> None:
    """Starts a thread and gives it 1 ms, in which one with little to do ends."""
    _start(thread)
    thread.join(0.001)


class SlowBank:
    """Adapters of which one is read until the test says that it is there."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.begun: list[tuple[LoadAdapter, Callable[[Any], object]]] = []
        self.has_begun, self.asked_again = threading.Event(), threading.Event()

    def listed(self) -> tuple[()]:
        return ()

    def is_coming(self, wanted: LoadAdapter) -> bool:
        found = any(one == wanted for one, _ in self.begun)
        if found:
            self.asked_again.set()
        return found

    def begin(self, wanted: LoadAdapter, done: Callable[[Any], object]) -> None:
        self.begun.append((wanted, done))
        self.has_begun.set()

    def finish(self, wanted: LoadAdapter, outcome: AdapterError | None) -> None:
        if outcome is not None:
            raise outcome

    def remove(self, name: str) -> None:
        if name in self.removed:
            raise unknown_adapter(name)
        self.removed.append(name)


@pytest.fixture
def bank(serve: Serve) -> SlowBank:
    """The adapters of an engine that is served."""
    engine, bank = make_engine(), SlowBank()
    engine.adapters = cast("Any", bank)
    serve(engine)
    return bank


@pytest.mark.parametrize("error", [None, AdapterError(AdapterFault.MISSING, "it is gone")])
def test_an_adapter_that_two_services_want_back_is_loaded_once_for_both(
    bank: SlowBank, path: Path, error: AdapterError | None
) -> None:
    wanted = LoadAdapter(name="a", source="b", replaces=True, digest="0")
    with Client(path) as first, Client(path) as second:
        first.send(wire.load(1, wanted))
        assert bank.has_begun.wait(TIMEOUT_S)
        second.send(wire.load(7, wanted))
        assert bank.asked_again.wait(TIMEOUT_S)
        ((_, done),) = bank.begun
        done(error)
        for client, number in ((first, 1), (second, 7)):
            assert str(settlement(client)) == str((number, error))


def test_a_call_that_asks_again_by_way_of_another_service_is_answered(
    bank: SlowBank, path: Path
) -> None:
    """While its adapter is loaded, after that, and when it was unloaded; another call is not."""
    wanted = LoadAdapter(name="a", source="b", call="its call")
    with Client(path) as second:
        with Client(path) as first:
            first.send(wire.load(1, wanted))
            assert bank.has_begun.wait(TIMEOUT_S)
        second.send(wire.load(2, wanted))
        assert bank.asked_again.wait(TIMEOUT_S)
        ((_, done),) = bank.begun
        done(None)
        assert settlement(second) == (2, None)
        second.send(wire.load(3, wanted))
        assert settlement(second) == (3, None)
        assert len(bank.begun) == 1
        for number, call in ((4, "to unload"), (5, "to unload"), (6, "another"), (7, "")):
            second.send(wire.unload(number, "a", call))
        errors = [error and error.fault for _, error in (settlement(second) for _ in range(4))]
    assert errors == [None, None, AdapterFault.UNKNOWN, AdapterFault.UNKNOWN]
    assert bank.removed == ["a"]


def settlement(client: Client) -> tuple[int, AdapterError | None]:
    """How a client's request for an adapter ended."""
    while True:
        (size,) = wire.HEADER.unpack(client.stream.read(wire.HEADER.size))
        kind, fields = wire.parse(client.stream.read(size))
        if kind is wire.Kind.SETTLED:
            return wire.parse_settled(fields)
