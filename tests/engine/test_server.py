"""The engine's socket: real connections to a server thread over a fake model."""

from __future__ import annotations

import queue
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgpack
import pytest

from engine.engine import Engine
from engine.protocol import wire
from engine.protocol.config import EngineInfo
from engine.protocol.request import (
    EngineStats,
    FinishReason,
    Request,
    SequenceOutput,
    StepOutput,
)
from engine.server import EngineServer
from tests.engine.fakes import VOCAB_SIZE, greedy_tokens, make_engine, token_ids

TIMEOUT_S = 10.0  # of anything that must happen; nothing waits for it to pass
INFO = EngineInfo(
    model_id="fake",
    model_sha=None,
    dtype="torch.float32",
    device="cpu",
    vocab_size=VOCAB_SIZE,
    max_total_tokens=256,
    max_batch_total_tokens=256,
    block_size=4,
    attention="none",
)


class Client:
    """A service's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves."""
        self.stream.close()
        self.socket.close()

    def send(self, frame: bytes) -> None:
        """Sends bytes as they are."""
        self.socket.sendall(frame)

    def read(self) -> wire.Kind | StepOutput | EngineInfo:
        """The next message; `EOFError` when the server has closed."""
        try:
            header = self.stream.read(wire.HEADER.size)
            if len(header) < wire.HEADER.size:
                raise EOFError
            (size,) = wire.HEADER.unpack(header)
            body = self.stream.read(size)
        except ConnectionError as error:
            raise EOFError from error
        if len(body) < size:
            raise EOFError
        kind, fields = wire.parse(body)
        if kind is wire.Kind.READY:
            return wire.parse_info(fields)
        return wire.parse_step(fields) if kind is wire.Kind.STEP else kind

    def step(self) -> StepOutput:
        """The next step; skips the greeting."""
        while not isinstance(message := self.read(), StepOutput):
            pass
        return message

    def until_ended(self, *request_ids: str) -> dict[str, list[SequenceOutput]]:
        """All outputs until these requests have ended."""
        outputs: dict[str, list[SequenceOutput]] = {}
        running = set(request_ids)
        while running:
            for output in self.step().outputs:
                outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not None or output.error is not None:
                    running.discard(output.request_id)
        return outputs

    def until_closed(self) -> list[StepOutput]:
        """All steps until the server closes."""
        steps = []
        try:
            while True:
                steps.append(self.step())
        except EOFError:
            return steps


class BigEngine:
    """Ends every request in one step, with a message far larger than a socket's buffer."""

    text = "x" * 3_000_000

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.stepped = threading.Event()

    @property
    def has_work(self) -> bool:
        """Whether a request waits."""
        return bool(self.request_ids)

    def prepare(self, request: Request, done: object) -> bool:
        """Is always ready."""
        return True

    def add(self, request: Request) -> None:
        """Takes every request."""
        self.request_ids.append(request.request_id)

    def abort(self, request_id: str) -> None:
        """Is too fast to be stopped."""

    def stats(self) -> EngineStats:
        """Nothing to tell."""
        return EngineStats()

    def step(self) -> StepOutput:
        """Ends what waits."""
        ids, self.request_ids = self.request_ids, []
        self.stepped.set()
        return StepOutput(outputs=tuple(SequenceOutput(request_id=i, error=self.text) for i in ids))


Serve = Callable[[Engine | BigEngine], EngineServer]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the server listens."""
    return tmp_path / "run" / "engine.sock"


@pytest.fixture
def serve(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Runs a server in a thread until the test ends."""
    monkeypatch.setattr("engine.server._HEARTBEAT_S", 0.02)
    running: list[tuple[EngineServer, threading.Thread]] = []

    def start(engine: Engine | BigEngine) -> EngineServer:
        server = EngineServer(engine, INFO, path)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        assert not path.exists()


def make_request(request_id: str = "r", *, max_new_tokens: int = 5) -> Request:
    """A plain request."""
    return Request(request_id=request_id, prompt_token_ids=(1, 2, 3), max_new_tokens=max_new_tokens)


def frame(body: bytes) -> bytes:
    """Any bytes with their length in front."""
    return wire.HEADER.pack(len(body)) + body


def until_idle(client: Client, gate: threading.Semaphore, after: StepOutput) -> list[StepOutput]:
    """Lets one step through at a time until nothing runs; ends well before 190 tokens do.

    What was sent before the step `after` may still be on its way, and says that nothing runs yet.
    """
    steps = []
    for _ in range(150):
        gate.release()
        steps.append(client.step())
        stats = steps[-1].stats
        if not stats.num_running and stats.num_steps >= after.stats.num_steps:
            return steps
    raise AssertionError("the request goes on")


def test_the_first_message_says_what_is_served(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        assert client.read() == INFO


def test_a_request_brings_steps_and_ends(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        outputs = client.until_ended("r")["r"]
    assert token_ids(outputs) == greedy_tokens((1, 2, 3), 5)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_requests_in_pieces_and_in_bunches_are_understood(serve: Serve, path: Path) -> None:
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


def test_a_service_that_leaves_takes_its_requests_along(serve: Serve, path: Path) -> None:
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


def test_a_service_cannot_touch_requests_of_another(serve: Serve, path: Path) -> None:
    gate = threading.Semaphore(0)
    serve(make_engine(gate=gate))
    with Client(path) as owner, Client(path) as other:
        other.step()  # a heartbeat: from here on it is told of every step
        owner.send(wire.submit(make_request("mine", max_new_tokens=190)))
        gate.release()
        while not owner.step().outputs:
            pass
        # The second message is answered, so the first was read by then.
        other.send(wire.frame(wire.Kind.ABORT, "mine"))
        other.send(wire.submit(make_request("mine")))
        gate.release()
        while not (answer := other.step().outputs):
            gate.release()
        assert answer[0].error is not None
        gate.release(400)
        assert owner.until_ended("mine")["mine"][-1].finish_reason is FinishReason.LENGTH


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
        wire.frame(wire.Kind.ABORT, ["unhashable"]),
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


def test_half_a_message_and_a_hang_up_harm_nobody(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as good:
        with Client(path) as bad:
            bad.send(wire.submit(make_request("half"))[:-3])
        good.send(wire.submit(make_request()))
        assert set(good.until_ended("r")) == {"r"}


def test_an_idle_engine_shows_that_it_lives(serve: Serve, path: Path) -> None:
    serve(make_engine())
    with Client(path) as client:
        assert [client.step().outputs for _ in range(3)] == [()] * 3


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


def test_stop_delivers_what_was_computed_before_it_closes(serve: Serve, path: Path) -> None:
    engine = BigEngine()
    server = serve(engine)
    with Client(path) as client:
        client.send(wire.submit(make_request()))
        assert engine.stepped.wait(TIMEOUT_S)
        server.stop()
        outputs = [output for step in client.until_closed() for output in step.outputs]
    assert [output.error for output in outputs] == [engine.text]


def test_a_service_that_does_not_read_is_closed_and_holds_up_nobody(
    serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.server._MAX_OUTBOX", 20)
    serve(BigEngine())
    with Client(path) as reads, Client(path) as deaf:
        deaf.send(wire.submit(make_request("deaf")))  # fills the buffer; heartbeats queue behind
        for index in range(5):
            reads.send(wire.submit(make_request(str(index))))
            assert set(reads.until_ended(str(index))) == {str(index)}
        for _ in range(40):
            assert reads.step().outputs == ()
        assert not any(step.outputs for step in deaf.until_closed()), "it was cut off"


def test_connections_that_end_at_once_leave_nothing_behind(
    path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Thread.start", _start_and_wait_a_turn)
    server = serve(make_engine())
    for _ in range(30):
        Client(path).close()
    with Client(path) as client:
        for _ in range(50):
            client.step()
            if len(server._connections) == 1:
                return
        raise AssertionError(f"{len(server._connections)} connections are kept")


_start = threading.Thread.start


def _start_and_wait_a_turn(thread: threading.Thread) -> None:
    """Starts a thread, and lets one that has little to do come to its end first."""
    _start(thread)
    thread.join(0.001)


class Compiler:
    """Lets a test say when a request's grammar is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.is_done = False
        monkeypatch.setattr(Engine, "prepare", self._prepare)

    def _prepare(self, _: Request, done: Callable[[], object]) -> bool:
        if not self.is_done:
            self.waiting.put(done)
        return self.is_done

    def finish(self) -> None:
        """Everything that was asked for is compiled now."""
        self.is_done = True
        while not self.waiting.empty():
            self.waiting.get()()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def test_others_go_on_while_a_grammar_is_compiled(
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


def test_a_request_that_was_aborted_meanwhile_does_not_run(
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


def test_a_service_that_comes_back_meanwhile_gets_its_answer(
    serve: Serve, path: Path, compiler: Compiler
) -> None:
    server = serve(make_engine())
    with Client(path) as first:
        first.send(wire.submit(make_request()))
        done = compiler.waiting.get(timeout=TIMEOUT_S)
    with Client(path) as second:
        second.step()
        while len(server._connections) > 1:  # a heartbeat at a time, until it sees the first leave
            second.step()
        second.send(wire.submit(make_request()))
        done_again = compiler.waiting.get(timeout=TIMEOUT_S)
        compiler.is_done = True
        done()
        done_again()
        assert len(second.until_ended("r")["r"]) == 5


def test_two_services_may_compile_under_one_id(
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
