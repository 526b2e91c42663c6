"""An engine server in a thread, and the services' end of its socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from engine.engine import Engine
from engine.protocol import wire
from engine.protocol.config import EngineInfo
from engine.protocol.request import EngineStats, Request, SequenceOutput, StepOutput
from engine.server import EngineServer
from tests.engine.fakes import VOCAB_SIZE

TIMEOUT_S = 10.0  # after which a test fails; no test waits for it to pass
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
        """Disconnects."""
        self.stream.close()
        self.socket.close()

    def send(self, frame: bytes) -> None:
        """Sends bytes."""
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
        """The next step; skips the `READY` message."""
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
        """Needs no preparation."""
        return True

    def add(self, request: Request) -> None:
        """Accepts every request."""
        self.request_ids.append(request.request_id)

    def abort(self, request_id: str) -> None:
        """Does nothing: requests end in the next step."""

    def stats(self) -> EngineStats:
        """All zeros."""
        return EngineStats()

    def step(self) -> StepOutput:
        """Ends all waiting requests."""
        ids, self.request_ids = self.request_ids, []
        self.stepped.set()
        return StepOutput(outputs=tuple(SequenceOutput(request_id=i, error=self.text) for i in ids))


Serve = Callable[[Engine | BigEngine], EngineServer]


@contextmanager
def running_servers(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Runs servers in threads until the end of the context."""
    monkeypatch.setattr("engine.server._IDLE_STEP_S", 0.02)
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


def make_request(request_id: str = "r", *, max_new_tokens: int = 5, caller: str = "") -> Request:
    """A request with the prompt 1, 2, 3."""
    return Request(
        request_id=request_id,
        prompt_token_ids=(1, 2, 3),
        max_new_tokens=max_new_tokens,
        caller=caller,
    )
