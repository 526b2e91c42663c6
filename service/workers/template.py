"""A process that is set up once and of which others are forked, which share what it has in memory.

It listens on a Unix socket, which is its standard input. It gets a setup, and then for each process
to fork one byte with the socket of that process; it answers with the process's number. Its side of
this is `serving.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import msgpack

from engine.protocol.wire import HEADER

from .priority import lower_priority

START_S = 180.0  # for a process of the lowest priority to start on a busy machine


class SlowStartError(OSError):
    """A process does not come up, or fork, in time: the machine is too busy."""


class ForkedProcess:
    """A process that was forked, with the interface of asyncio's own."""

    def __init__(self, pid: int, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self._descriptor = os.pidfd_open(pid)  # a number may be given to another process
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._end)

    def kill(self) -> None:
        """Kills it.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self._ended.is_set():
            raise ProcessLookupError
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def wait(self) -> None:
        """Waits for its end."""
        await self._ended.wait()
        self.stdin.close()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._ended.set()


class Template:
    """The process, started when it is first needed and again after it has died.

    Args:
        module: what it runs: a module that calls `serving.serve_forks`.
        max_bytes: of address space that a forked process may add to what it is born with.
        setup: what the process is told at its start, framed.
    """

    def __init__(self, module: str, max_bytes: int, setup: bytes) -> None:
        self._module = module
        self._max_bytes = max_bytes
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()  # held while the process starts, and while it forks
        self._forks: set[asyncio.Task[ForkedProcess]] = set()
        self._report: Any = None

    async def start(self) -> Any:
        """Starts the process unless it runs; returns what it reports of its setup.

        Raises:
            OSError: it does not come up.
        """
        async with self._lock:
            return await self._start()

    async def fork(self) -> ForkedProcess:
        """A new process.

        Raises:
            OSError: there is none.
        """
        # A caller that leaves must not stop it halfway, which would cost all processes their lives.
        task = asyncio.create_task(self._fork())
        self._forks.add(task)
        task.add_done_callback(self._forks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_discard)
            raise

    async def stop(self) -> None:
        """Kills the process, and with it all that were forked of it."""
        forks = list(self._forks)
        for task in forks:
            task.cancel()
        await asyncio.gather(*forks, return_exceptions=True)
        await self._kill()

    async def _fork(self) -> ForkedProcess:
        async with self._lock:
            await self._start()
            ours, theirs = _socket_pair()
            try:
                pid = await self._number_of(theirs)
                reader, writer = await asyncio.open_unix_connection(sock=ours)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
        try:
            await reader.readexactly(HEADER.size + 1)  # its first message, of nothing: it is ready
            return ForkedProcess(pid, writer, reader)
        except BaseException:
            writer.close()
            raise

    async def _number_of(self, theirs: socket.socket) -> int:
        """The number of a new process that serves a socket."""
        sock = self._socket
        assert sock is not None
        try:
            socket.send_fds(sock, [b"f"], [theirs.fileno()])
            async with asyncio.timeout(START_S):
                return int(await _receive(sock))
        except BaseException as error:
            await self._kill()  # an answer that comes later would be taken for the next one's
            if isinstance(error, TimeoutError):
                raise SlowStartError("the process does not fork") from error
            raise

    async def _start(self) -> Any:
        if self._process is not None and self._process.returncode is None:
            return self._report
        await self._kill()
        self._socket, theirs = _socket_pair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                str(self._max_bytes),
                str(os.getpid()),
                stdin=theirs.fileno(),
                # Threads of numpy would not survive a fork, and nothing here needs them.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._report = await self._set_up(self._socket)
        await lower_priority(self._process.pid)  # of those that are forked, too
        return self._report

    async def _set_up(self, sock: socket.socket) -> Any:
        try:
            async with asyncio.timeout(START_S):
                await asyncio.get_running_loop().sock_sendall(sock, self._setup)
                return await _receive(sock)
        except BaseException as error:
            await self._kill()
            if isinstance(error, TimeoutError):
                raise SlowStartError("the process does not come up") from error
            raise

    async def _kill(self) -> None:
        process, self._process = self._process, None
        sock, self._socket = self._socket, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if sock is not None:
            sock.close()


def _discard(task: asyncio.Task[ForkedProcess]) -> None:
    """Ends a process that nobody waits for any more."""
    if not task.cancelled() and task.exception() is None:
        with suppress(ProcessLookupError):
            task.result().kill()
        task.result().stdin.close()


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a socket: ours, which does not block, and another process's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return ours, theirs


async def _receive(sock: socket.socket) -> Any:
    (size,) = HEADER.unpack(await _exactly(sock, HEADER.size))
    return msgpack.unpackb(await _exactly(sock, size))


async def _exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: the other side has ended.
    """
    received = b""
    while len(received) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(received))
        if not part:
            raise ConnectionError("the process has ended")
        received += part
    return received
