"""A process for work that may take too long: it has the lowest priority, and is killed when late.

It gets a setup, then one request after the other over its standard input, and answers over its
standard output: each is msgpack after its length. Its side of this is `serving.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import psutil

from engine.protocol.wire import HEADER, framed

_START_S = 60.0  # for a process to start on a busy machine
_NICENESS = 12  # of the processes' sessions; with less they slow other processes down (measured)
_NUM_TRIES, _RETRY_S = 50, 0.1  # to set it
_MIN_SHARE = 0.25  # of a processor; with less the machine is at fault that an answer is late
_NUM_TRIALS = 2  # of a request whose process dies, which need not be the request's fault


class LateError(Exception):
    """There was no answer in time, and the process was killed.

    Attributes:
        is_starved: whether it had hardly any processor time, so that the machine is too busy.
    """

    def __init__(self, *, is_starved: bool) -> None:
        super().__init__("no answer in time")
        self.is_starved = is_starved


class DeadError(Exception):
    """The process ended instead of answering, and so did the next one."""


class WorkerProcess:
    """One process, started when it is first needed and again after it had to be killed.

    Args:
        module: what it runs: a module that calls `serving.serve`.
        max_bytes: of its address space.
        setup: what it is told at its start, framed.
    """

    def __init__(self, module: str, max_bytes: int, setup: bytes) -> None:
        self._module = module
        self._max_bytes = max_bytes
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._trying = asyncio.Event()  # the process has started: the request's time begins

    async def answers_soon(self, asking: asyncio.Task[Any], soon_s: float) -> bool:
        """Whether `ask` ends in so many seconds, counted from when the process runs."""
        trying = asyncio.create_task(self._trying.wait())
        try:
            await asyncio.wait({asking, trying}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({asking}, timeout=soon_s)
        finally:
            trying.cancel()
        return asking.done()

    async def ask(self, request: Any, deadline_s: float) -> Any:
        """The answer to a request. A process that does not answer in time is killed.

        Raises:
            LateError: it did not.
            DeadError: it died, twice.
        """
        self._trying.clear()
        for _ in range(_NUM_TRIALS):
            try:
                process = self._process or await self._start()
                before = _processor_s(process.pid)
                self._trying.set()
                async with asyncio.timeout(deadline_s):
                    return await _exchange(process, framed(request))
            except TimeoutError:
                spent = _processor_s(process.pid) - before
                await self.stop()
                raise LateError(is_starved=spent < _MIN_SHARE * deadline_s) from None
            except (OSError, psutil.Error, asyncio.IncompleteReadError):
                await self.stop()
            except asyncio.CancelledError:
                await self.stop()
                raise
        raise DeadError

    async def start(self) -> None:
        """Starts the process before it is needed. If that fails, `ask` tries again."""
        with suppress(OSError, psutil.Error, asyncio.IncompleteReadError):
            if self._process is None:
                await self._start()

    async def stop(self) -> None:
        """Kills the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        """Starts the process and waits until it is ready: a request's time begins only then."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            str(self._max_bytes),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        await _lower_priority(process.pid)
        try:
            async with asyncio.timeout(_START_S):
                await _exchange(process, self._setup)
        except TimeoutError as error:
            raise OSError("the process does not come up") from error
        return process


async def _lower_priority(pid: int) -> None:
    """Gives a process the lowest priority, right after its start, while it imports."""
    with suppress(OSError):  # the process may have ended; not every kernel has autogroups
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(_NUM_TRIES):
            if _lower_session(pid):
                return
            await asyncio.sleep(_RETRY_S)


def _lower_session(pid: int) -> bool:
    """Lowers the priority of a process's session; returns False if it has to be tried again.

    With autogroups Linux divides the processors among sessions first, then within each of them. It
    allows ten changes a second, of all users together.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICENESS))
    except BlockingIOError:
        return False
    return True


def _processor_s(pid: int) -> float:
    """Processor time that a process has had, in seconds."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def _exchange(process: asyncio.subprocess.Process, message: bytes) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(message)
    await process.stdin.drain()
    (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
    return msgpack.unpackb(await process.stdout.readexactly(size))
