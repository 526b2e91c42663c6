"""Requests over the engine's socket: real connections to a server thread over a fake model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.protocol import wire
from engine.protocol.request import FinishReason, Request, StepOutput
from tests.engine.fakes import greedy_tokens, make_engine, token_ids
from tests.engine.sockets import INFO, TIMEOUT_S, Client, Serve, make_request


def until_idle(client: Client, gate: threading.Semaphore, after: StepOutput) -> list[StepOutput]:
    """Allows one step at a time until nothing runs, 150 at most: fewer than 190 tokens take.

    Messages from before the step `after` may still arrive, and report that nothing runs yet.
    """
    steps = []
    for _ in range(150):
        gate.release()
        steps.append(client.step())
        stats = steps[-1].stats
        if not stats.num_running and stats.num_steps >= after.stats.num_steps:
            return steps
    raise AssertionError("the request goes on")


def test_the_first_message_describes_the_engine(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        assert client.read() == INFO


def test_a_request_is_taken_before_anything_is_computed(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate))
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        while (message := client.read()) is not wire.Kind.TAKEN:
            assert not isinstance(message, StepOutput) or not message.stats.num_steps
        gate.release(100)
        assert token_ids(client.until_ended("r")["r"]) == greedy_tokens((1, 2, 3), 5)


def test_a_request_is_answered_with_steps_until_it_ends(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        outputs = client.until_ended("r")["r"]
    assert token_ids(outputs) == greedy_tokens((1, 2, 3), 5)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_requests_may_arrive_in_pieces_or_together(serve: Serve, path: Path) -> None:
    serve(make_engine())
    names = [str(i) for i in range(5)]
    message = b"".join(wire.submit(make_request(name)) for name in names)
    with Client(path) as client:
        for byte in message[:60]:
            client.send(bytes([byte]))
        client.send(message[60:])
        outputs = client.until_ended(*names)
    assert {tuple(token_ids(stream)) for stream in outputs.values()} == {
        tuple(greedy_tokens((1, 2, 3), 5))
    }


def test_a_request_that_cannot_be_served_is_answered(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        client.send(wire.submit(make_request(max_new_tokens=10_000)))
        (output,) = client.until_ended("r")["r"]
    assert output.error is not None
    assert "do not fit" in output.error


def test_abort_ends_a_request_without_an_answer(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate))
    with Client(path) as client:
        client.send(wire.submit(make_request(max_new_tokens=190)))
        gate.release()
        while not (first := client.step()).outputs:
            pass
        client.send(wire.frame(wire.Kind.ABORT, "r"))
        steps = until_idle(client, gate, first)
    assert not any(output.finish_reason for step in steps for output in step.outputs)
    assert steps[-1].stats.num_free_blocks == steps[-1].stats.num_blocks


def test_requests_of_a_service_that_disconnects_are_aborted(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate))
    with Client(path) as stays:
        with Client(path) as leaves:
            leaves.send(wire.submit(make_request(max_new_tokens=190)))
            gate.release()
            while not (first := leaves.step()).outputs:
                pass
        steps = until_idle(stays, gate, first)
    assert steps[-1].stats.num_free_blocks == steps[-1].stats.num_blocks


def test_two_services_get_their_own_outputs_only(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as first, Client(path) as second:
        first.send(wire.submit(make_request("a", max_new_tokens=20)))
        second.send(wire.submit(make_request("b", max_new_tokens=20)))
        assert set(first.until_ended("a")) == {"a"}
        assert set(second.until_ended("b")) == {"b"}


def test_a_service_cannot_abort_or_replace_requests_of_another(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate))
    with Client(path) as owner, Client(path) as other:
        other.step()  # a heartbeat: from here on it receives every step
        owner.send(wire.submit(make_request("mine", max_new_tokens=190)))
        gate.release()
        while not owner.step().outputs:
            pass
        # When the second message is answered, the first has been read.
        other.send(wire.frame(wire.Kind.ABORT, "mine"))
        other.send(wire.submit(make_request("mine")))
        gate.release()
        while not (answer := other.step().outputs):
            gate.release()
        assert answer[0].error is not None
        gate.release(400)
        assert owner.until_ended("mine")["mine"][-1].finish_reason is FinishReason.LENGTH


class Compiler:
    """Lets a test decide when a request's grammar is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.is_done = False
        monkeypatch.setattr(Engine, "prepare", self._prepare)

    def _prepare(self, _: Request, done: Callable[[], object]) -> bool:
        if not self.is_done:
            self.waiting.put(done)
        return self.is_done

    def finish(self) -> None:
        """Reports all waiting grammars as compiled."""
        self.is_done = True
        while not self.waiting.empty():
            self.waiting.get()()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def test_other_requests_continue_while_a_grammar_is_compiled(
    serve: Serve, path: Path, compiler: Compiler
) -> None:
    serve(make_engine())
    with Client(path) as client:
        client.send(wire.submit(make_request("slow")))
        done = compiler.waiting.get(timeout=TIMEOUT_S)
        compiler.is_done = True
        client.send(wire.submit(make_request("quick")))
        assert "slow" not in client.until_ended("quick")
        done()
        assert len(client.until_ended("slow")["slow"]) == 5


def test_a_request_aborted_while_its_grammar_is_compiled_does_not_run(
    serve: Serve, path: Path, compiler: Compiler
) -> None:
    serve(make_engine())
    with Client(path) as client:
        client.send(wire.submit(make_request("gone")))
        done = compiler.waiting.get(timeout=TIMEOUT_S)
        compiler.is_done = True
        client.send(wire.frame(wire.Kind.ABORT, "gone"))
        client.send(wire.submit(make_request("a")))
        client.until_ended("a")  # the abort has been read by then
        done()
        client.send(wire.submit(make_request("b")))
        assert "gone" not in client.until_ended("b")


def test_a_service_that_reconnects_while_its_grammar_is_compiled_is_answered(
    serve: Serve, path: Path, compiler: Compiler
) -> None:
    server = serve(make_engine())
    with Client(path) as first:
        first.send(wire.submit(make_request()))
        done = compiler.waiting.get(timeout=TIMEOUT_S)
    with Client(path) as second:
        second.step()
        while len(server._connections) > 1:  # until the first one's disconnect is handled
            second.step()
        second.send(wire.submit(make_request()))
        done_again = compiler.waiting.get(timeout=TIMEOUT_S)
        compiler.is_done = True
        done()
        done_again()
        assert len(second.until_ended("r")["r"]) == 5


def test_two_services_may_use_one_id_while_grammars_are_compiled(
    serve: Serve, path: Path, compiler: Compiler
) -> None:
    serve(make_engine())
    with Client(path) as first, Client(path) as second:
        first.send(wire.submit(make_request()))
        done = compiler.waiting.get(timeout=TIMEOUT_S)
        second.send(wire.submit(make_request()))
        compiler.waiting.get(timeout=TIMEOUT_S)
        compiler.is_done = True
        done()
        assert len(first.until_ended("r")["r"]) == 5
