"""A process for work that may take too long: it has the lowest priority, and is killed when late.

It gets a setup, then one request after the other over its standard input, and answers over its
standard output: each is msgpack after its length. Its side of this is `serving.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgpack
import psutil

from engine.protocol.wire import HEADER, framed

from .priority import lower_priority
from .template import START_S, ForkedProcess, SlowStartError, Template

_MIN_SHARE = 0.25  # of a processor; with less the machine is at fault that an answer is late
_NUM_TRIALS = 2  # of a request whose process dies, which need not be the request's fault


class LateError(Exception):
    """There was no answer in time, and the process was killed; or none came up.

    Attributes:
        is_starved: whether the machine is at fault: the process had hardly any processor time, or
            there was none.
    """

    def __init__(self, *, is_starved: bool) -> None:
        super().__init__("no answer in time")
        self.is_starved = is_starved


class DeadError(Exception):
    """The process ended instead of answering, and so did the next one.

    What ends while nobody asks it, or before it is ready, does not count.
    """


Process = asyncio.subprocess.Process | ForkedProcess


class WorkerProcess:
    """One process, started when it is first needed and again after it had to be killed.

    Args:
        start: starts the process and returns when it is ready.
    """

    def __init__(self, start: Callable[[], Awaitable[Process]]) -> None:
        self._start_process = start
        self._process: Process | None = None
        self._trying = asyncio.Event()  # the process has started: the request's time begins

    @classmethod
    def of_module(cls, module: str, max_bytes: int, setup: bytes) -> WorkerProcess:
        """One that runs a module.

        Args:
            module: a module that calls `serving.serve`.
            max_bytes: of its address space.
            setup: what it is told at its start, framed.
        """
        return cls(partial(_started, module, max_bytes, setup))

    @classmethod
    def of_template(cls, template: Template) -> WorkerProcess:
        """One that is forked."""
        return cls(template.fork)

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
            LateError: it did not, or does not come up.
            DeadError: it died, twice.
        """
        return (await self.ask_for_parts(request, deadline_s))[1]

    async def ask_for_parts(self, request: Any, deadline_s: float) -> tuple[list[bytes], Any]:
        """The bytes that a process sends before its answer, part by part, and the answer.

        Raises:
            LateError: the answer does not come in time, or no process comes up. It is killed.
            DeadError: it died, twice.
        """
        self._trying.clear()
        message = await asyncio.to_thread(framed, request)  # which copies megabytes several times
        num_deaths = 0
        for _ in range(_NUM_TRIALS):
            is_asked = False
            try:
                process = self._process or await self._start()
                before = _processor_s(process.pid)
                self._trying.set()
                is_asked = True
                async with asyncio.timeout(deadline_s):
                    return await _exchange(process, message)
            except TimeoutError:
                spent = _processor_s(process.pid) - before
                await self.stop()
                raise LateError(is_starved=spent < _MIN_SHARE * deadline_s) from None
            except SlowStartError:  # whatever the request is, it was not looked at
                raise LateError(is_starved=True) from None
            except (OSError, psutil.Error, asyncio.IncompleteReadError):
                await self.stop()
                num_deaths += is_asked
            except asyncio.CancelledError:
                await self.stop()
                raise
        if num_deaths < _NUM_TRIALS:
            raise LateError(is_starved=True)
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

    async def _start(self) -> Process:
        """Starts the process: a request's time begins only when it is ready."""
        self._process = await self._start_process()
        return self._process


async def _started(module: str, max_bytes: int, setup: bytes) -> Process:
    """A process that runs a module.

    Raises:
        OSError: it does not come up.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        str(max_bytes),
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await lower_priority(process.pid)
        async with asyncio.timeout(START_S):
            await _exchange(process, setup)
    except BaseException as error:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise SlowStartError("the process does not come up") from error
        raise
    return process


def _processor_s(pid: int) -> float:
    """Processor time that a process has had, in seconds."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def _exchange(process: Process, message: bytes) -> tuple[list[bytes], Any]:
    assert process.stdin is not None
    process.stdin.write(message)
    await process.stdin.drain()
    parts: list[bytes] = []
    while isinstance(answer := await _next_message(process), bytes):
        parts.append(answer)
    return parts, answer


async def _next_message(process: Process) -> Any:
    assert process.stdout is not None
    (size,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
    return msgpack.unpackb(await process.stdout.readexactly(size))
