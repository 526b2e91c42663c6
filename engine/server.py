"""The engine process: a Unix socket in front of the step loop.

The main thread owns the engine and runs steps; another one tells whether it gets on. Each
connection has a thread that reads into the inbox and one that writes from an outbox, so no peer can
hold up a step. A connection that ends takes its requests with it; one that does not read what it is
sent is closed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .cuda_segments import prefer_growing_segments
from .heartbeat import Activity, Heartbeat, Phase
from .kernels.build import SWITCH, build_ahead
from .lean_imports import lean_imports
from .library_pages import give_back_library_pages
from .protocol import wire
from .protocol.adapters import AdapterInfo, LoadAdapter
from .protocol.c_heap import limit_arenas, trim
from .protocol.config import EngineConfig, EngineInfo
from .protocol.errors import AdapterError, no_adapter_directory, unknown_adapter
from .protocol.notify import READY, notify
from .protocol.processors import num_processors
from .protocol.request import Moment, Request, SequenceOutput, StepOutput
from .threads import pin, unpin

if TYPE_CHECKING:  # torch takes a second, in which the heartbeat could not beat
    from .adapters.bank import AdapterBank
    from .adapters.loader import Outcome
    from .engine import Engine
    from .ranks.leader import Leader

logger = logging.getLogger(__name__)

_IDLE_STEP_S = 0.5  # an idle engine sends a step without outputs this often
_DRAIN_S = 90.0  # TGI's time limit for running requests after it is told to stop
_FLUSH_S = 5.0  # time limit for sending what is queued when the server ends
_MAX_MADE = 256  # calls that are known to have changed adapters; they are made again within seconds
_MAX_OUTBOX = 20_000  # messages; at 100 steps a second the peer has not read for minutes


class _Connection:
    """The connection of one service: its socket, and the messages that wait to be sent."""

    def __init__(self, sock: socket.socket, inbox: queue.SimpleQueue[_Delivery]) -> None:
        self.told: tuple[AdapterInfo, ...] = ()  # when it began
        self._sock = sock
        self._inbox = inbox
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)

    def start(self) -> None:
        """Starts to write and read; the connection must be announced in the inbox before.

        In this order: whoever has asked for something gets it before `finish` closes.
        """
        self._writer.start()
        self._reader.start()

    def send(self, message: bytes) -> None:
        """Queues a message; never waits."""
        if self._outbox.qsize() > _MAX_OUTBOX:
            logger.warning("a service does not read: its connection is closed")
            self.close()
            return
        self._outbox.put(message)

    def finish(self, deadline: float) -> None:
        """Closes after sending what is queued, or at `deadline`, in seconds of `time.monotonic`."""
        self._outbox.put(None)
        if self._writer.is_alive():  # else the connection has not been started yet
            self._writer.join(max(0.0, deadline - time.monotonic()))
        self.close()

    def close(self) -> None:
        """Ends both threads; the reader reports the end to the inbox."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as stream:
                while len(header := stream.read(wire.HEADER.size)) == wire.HEADER.size:
                    (size,) = wire.HEADER.unpack(header)
                    if not 0 < size <= wire.MAX_FRAME_BYTES:
                        raise ValueError(f"a frame of {size} bytes")
                    self._inbox.put((self, stream.read(size)))
        except (OSError, ValueError) as error:
            logger.warning("connection lost: %s", error)
        self._outbox.put(None)
        self._inbox.put((self, None))

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._sock.sendall(message)
        self._sock.close()


@dataclass(frozen=True, slots=True)
class _Read:
    """An adapter that was read; `number` is that of the message that asked for it."""

    number: int
    wanted: LoadAdapter
    outcome: Outcome


# A connection with one of: b"" when it starts, the body of a frame, a request whose grammar is
# compiled by now, an adapter that is read by now, None when it has ended.
_Delivery = tuple[_Connection, bytes | Request | _Read | None]


class EngineServer:
    """Serves one engine to any number of services.

    Args:
        engine: the engine, owned by the thread that calls `run`.
        info: is sent to every service that connects.
        socket_path: where to listen. Its directory must be private to the user.
        activity: where the thread that calls `run` notes what it does.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        socket_path: Path,
        activity: Activity | None = None,
    ) -> None:
        self._engine = engine
        self._info = info
        self._listed = info.adapters  # replaced, never changed: another thread reads it
        self._joined: list[tuple[_Connection, int, LoadAdapter]] = []  # loads that others began
        self._made: deque[str] = deque(maxlen=_MAX_MADE)  # calls whose loads and unloads are done
        self._activity = activity or Activity()
        self._inbox: queue.SimpleQueue[_Delivery] = queue.SimpleQueue()
        # As they came, the longest connected first; read by other threads.
        self._connections: tuple[_Connection, ...] = ()
        self._owners: dict[str, _Connection] = {}
        self._preparing: set[tuple[_Connection, str]] = set()  # whose grammar is being compiled
        self._stopping = threading.Event()
        self._is_leaving = False  # all services know that it is stopping
        self._socket_path = socket_path
        self._listener = _listen(socket_path)

    def run(self) -> None:
        """Serves until `stop`, then finishes running requests, for `_DRAIN_S` seconds at most."""
        threading.Thread(target=self._accept, daemon=True).start()
        last_step = 0.0
        while not self._stopping.is_set():
            self._activity.begin(Phase.WAITING_FOR_REQUESTS)
            self._drain_inbox()
            if self._engine.has_work:
                self._step()
                last_step = time.monotonic()
            elif time.monotonic() - last_step >= _IDLE_STEP_S:
                self._publish(StepOutput(stats=self._engine.stats()))
                last_step = time.monotonic()
        self._finish()

    def beat(self, quiet_s: float) -> None:
        """Tells all services for how long there was no progress. May be called from any thread."""
        for connection in self._connections:
            connection.send(wire.beat(quiet_s))

    def stop(self) -> None:
        """Asks `run` to return. May be called from any thread or a signal handler."""
        self._stopping.set()

    def _finish(self) -> None:
        self._is_leaving = True
        for connection in self._connections:
            connection.send(wire.frame(wire.Kind.LEAVING))
        deadline = time.monotonic() + _DRAIN_S
        while (self._engine.has_work or self._preparing) and time.monotonic() < deadline:
            self._activity.begin(Phase.WAITING_FOR_REQUESTS)
            self._drain_inbox()
            self._step()
        self._listener.close()
        self._socket_path.unlink(missing_ok=True)
        deadline = time.monotonic() + _FLUSH_S
        for connection in self._connections:
            connection.finish(deadline)

    def _step(self) -> None:
        self._activity.begin(Phase.COMPUTING)
        self._publish(self._engine.step())

    def _accept(self) -> None:
        unpin()  # the threads of connections are started here and inherit the processors
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:  # the listener is closed, or there are no file descriptors
                self._stopping.wait(_IDLE_STEP_S)
                if not self._stopping.is_set():
                    logger.warning("cannot accept a connection: %s", error)
                continue
            connection = _Connection(sock, self._inbox)
            connection.told = self._listed
            connection.send(wire.ready(replace(self._info, adapters=connection.told)))
            self._inbox.put((connection, b""))
            connection.start()  # last: its announcement comes before its first message

    def _drain_inbox(self) -> None:
        """Handles all messages in the inbox; an idle engine waits a while for one."""
        timeout = 0.0 if self._engine.has_work else _IDLE_STEP_S / 2
        with contextlib.suppress(queue.Empty):
            self._receive(*self._inbox.get(block=timeout > 0, timeout=timeout or None))
            while True:
                self._receive(*self._inbox.get_nowait())

    def _receive(self, connection: _Connection, body: bytes | Request | _Read | None) -> None:
        if body is None:
            self._disconnect(connection)
        elif isinstance(body, Request):
            if (connection, body.request_id) in self._preparing:  # else it was aborted
                self._preparing.remove((connection, body.request_id))
                self._prepare(connection, body)  # again: the cache may have evicted the grammar
        elif isinstance(body, _Read):
            self._settle_load(connection, body)
        elif body:
            self._handle(connection, body)
        else:
            self._connections += (connection,)
            if self._is_leaving:
                connection.send(wire.frame(wire.Kind.LEAVING))
            if connection.told != self._listed:
                connection.send(wire.adapters(self._listed))

    def _handle(self, connection: _Connection, body: bytes) -> None:
        try:
            kind, fields = wire.parse(body)
            if kind is wire.Kind.SUBMIT:
                self._take(connection, wire.parse_request(fields))
            elif kind is wire.Kind.ABORT:
                self._abort(connection, wire.parse_id(fields))
            elif kind is wire.Kind.LOAD:
                self._load(connection, *wire.parse_load(fields))
            elif kind is wire.Kind.UNLOAD:
                self._unload(connection, *fields)
        except (ValueError, TypeError, IndexError):
            logger.exception("a service sent a message that cannot be read")
            connection.close()

    def _load(self, connection: _Connection, number: int, wanted: LoadAdapter) -> None:
        """Starts to load an adapter; the answer comes when it is there.

        After a crash every service asks for those that there were: it is loaded for all at once.
        A service that ends may leave a call unanswered, which then asks again by way of another.
        """

        def done(outcome: Outcome) -> None:
            self._inbox.put((connection, _Read(number, wanted, outcome)))

        try:
            if wanted.call in self._made:
                connection.send(wire.settled(number, None))
            elif self._adapters().is_coming(wanted):
                self._joined.append((connection, number, wanted))
            else:
                self._adapters().begin(wanted, done)
        except AdapterError as error:
            connection.send(wire.settled(number, error))

    def _settle_load(self, connection: _Connection, read: _Read) -> None:
        error = None
        try:
            self._adapters().finish(read.wanted, read.outcome)
            self._note_made(read.wanted.call)
        except AdapterError as refused:
            error = refused
        self._announce()
        joined = [one for one in self._joined if one[2] == read.wanted]
        self._joined = [one for one in self._joined if one not in joined]
        for waiting, number, _ in [(connection, read.number, read.wanted), *joined]:
            waiting.send(wire.settled(number, error))

    def _unload(self, connection: _Connection, number: int, name: str, call: str) -> None:
        error = None
        try:
            if self._engine.adapters is None:
                raise unknown_adapter(name)
            if call not in self._made:
                self._engine.adapters.remove(name)
                self._note_made(call)
        except AdapterError as refused:
            error = refused
        self._announce()
        connection.send(wire.settled(number, error))

    def _note_made(self, call: str) -> None:
        if call:
            self._made.append(call)

    def _adapters(self) -> AdapterBank:
        """The adapters.

        Raises:
            AdapterError: this engine has no places for any.
        """
        if self._engine.adapters is None:
            raise no_adapter_directory()
        return self._engine.adapters

    def _announce(self) -> None:
        """Tells all services which adapters are loaded, if that has changed."""
        listed: tuple[AdapterInfo, ...] = ()
        if self._engine.adapters is not None:
            listed = self._engine.adapters.listed()
        if listed != self._listed:
            self._listed = listed
            for connection in self._connections:
                connection.send(wire.adapters(listed))

    def _take(self, connection: _Connection, request: Request) -> None:
        """Says first that the request is here: if it ends this process, that shall be known.

        What comes after the service was told that this engine leaves, its service gives to another.
        """
        if self._is_leaving:
            return
        connection.send(wire.taken(request.request_id))
        self._prepare(connection, request)

    def _prepare(self, connection: _Connection, request: Request) -> None:
        """Submits a request, at once or as soon as its grammar is compiled."""

        def done() -> None:
            self._inbox.put((connection, request))

        if self._engine.prepare(request, done):
            self._submit(connection, request)
        else:
            self._preparing.add((connection, request.request_id))

    def _submit(self, connection: _Connection, request: Request) -> None:
        refused = self._engine.add(request)
        if refused is None:
            self._owners[request.request_id] = connection
        else:
            connection.send(wire.step(self._reply(refused)))

    def _abort(self, connection: _Connection, request_id: str) -> None:
        if (connection, request_id) in self._preparing:
            self._preparing.remove((connection, request_id))
        elif self._owners.get(request_id) is connection:
            del self._owners[request_id]
            self._engine.abort(request_id)

    def _reply(self, output: SequenceOutput) -> StepOutput:
        return StepOutput(outputs=(output,), stats=self._engine.stats())

    def _disconnect(self, connection: _Connection) -> None:
        self._connections = tuple(c for c in self._connections if c is not connection)
        self._preparing = {item for item in self._preparing if item[0] is not connection}
        orphans = [key for key, owner in self._owners.items() if owner is connection]
        for request_id in orphans:
            del self._owners[request_id]
            self._engine.abort(request_id)
        if orphans:
            logger.info("a service left; %d requests aborted", len(orphans))

    def _publish(self, output: StepOutput) -> None:
        """Sends each service its outputs of a step, and the engine's figures.

        Only the longest connected one gets the step's own figures: services count them, and a sum
        over all services is right if none is told what another has counted.
        """
        parts: defaultdict[_Connection, list[SequenceOutput]] = defaultdict(list)
        moments: defaultdict[_Connection, list[Moment]] = defaultdict(list)
        for moment in output.moments:  # before the owners of finished requests are forgotten
            if (owner := self._owners.get(moment.request_id)) is not None:
                moments[owner].append(moment)
        for item in output.outputs:
            owner = self._owners.get(item.request_id)
            if item.is_last:
                self._owners.pop(item.request_id, None)
            if owner is not None:
                parts[owner].append(item)
        told = output
        for connection in self._connections:
            part = tuple(parts.get(connection, ()))
            happened = tuple(moments.get(connection, ()))
            connection.send(wire.step(replace(told, outputs=part, moments=happened)))
            told = StepOutput(stats=output.stats)


def _listen(path: Path) -> socket.socket:
    """Binds the socket, replacing that of an engine that has died."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def serve(config: EngineConfig) -> None:
    """Loads the model and serves it until SIGTERM or SIGINT.

    Raises:
        ModelLoadError: the model cannot be served.
    """
    limit_arenas()
    activity = Activity()
    heartbeat = Heartbeat(activity)
    heartbeat.start()
    # Whoever asks for kernels without a configuration, and ranks, shall find what this one says.
    os.environ[SWITCH] = "1" if config.enable_native_kernels else "0"
    if config.device != "cpu":
        prefer_growing_segments()
    if config.device != "cuda":
        build_ahead()
    if config.num_shards == 1:
        _serve(config, activity, heartbeat, None)
        return
    with lean_imports(is_divided=True):
        from .ranks.leader import Leader

    with Leader(config, activity) as leader:
        heartbeat.listeners.append(leader.heard)
        _serve(config, activity, heartbeat, leader)


def _serve(
    config: EngineConfig, activity: Activity, heartbeat: Heartbeat, leader: Leader | None
) -> None:
    started = time.monotonic()
    with lean_imports(is_divided=leader is not None):
        from .build import build_engine  # imports torch and transformers: seconds
    imported = time.monotonic()
    ranks = None if leader is None else leader.ranks
    engine, info = build_engine(config, activity=activity, ranks=ranks)
    server = EngineServer(engine, info, config.socket_path, activity)
    heartbeat.listeners.append(server.beat)

    def stop(_: int, __: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logger.info(
        "engine ready: %s on %s, %s (imports %.1f s, model %.1f s)",
        info.model_id,
        info.device,
        info.attention,
        imported - started,
        time.monotonic() - imported,
    )
    if info.device == "cpu" and leader is None:
        pin(config.num_threads or num_processors())
    gc.collect()
    gc.freeze()  # these objects stay: a full collection would take 200 ms to visit them
    trim()
    give_back_library_pages()
    if leader is not None:
        leader.begin_serving()
    notify(READY)
    server.run()
