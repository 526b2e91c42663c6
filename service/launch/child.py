"""One child process: its start, its output, its end.

Asyncio's own pipes are not used: on Python 3.11 they hide a child's death for as long as one of its
children holds the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from ..log_lines import message_of
from ..parent import die_with_parent

logger = logging.getLogger(__name__)

_TAIL_LINES = 20
_LAST_WORDS_S = 2.0  # before its end; older lines are about something else, errors excepted
_CHUNK_BYTES = 64 * 1024


class Child:
    """One child process in a session of its own; it dies with this process.

    Args:
        name: its role, with a number where several children have it: `service-2`.
        command: what runs it.
        environment: all its variables.
        processors: those that it may use; none for those of this process.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        processors: frozenset[int] = frozenset(),
    ) -> None:
        self.name = name
        self.role = name.partition("-")[0]
        self._command = command
        self._environment = environment
        self._processors = processors
        self._process: asyncio.subprocess.Process | None = None
        self._relay: asyncio.Task[None] | None = None
        # Also of processes that have ended: one that they left may hold their pipe a while longer.
        self._relays: set[asyncio.Task[None]] = set()
        self._tail: deque[tuple[float, str]] = deque(maxlen=_TAIL_LINES)  # with their times
        self._started = 0.0
        self._ended: float | None = None
        self._reason = ""  # why this process killed it

    async def start(self) -> None:
        """Starts the process, for the first time or again."""
        reader, transport, write_end = await _open_pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                # Not PIPE: asyncio would see the end only when no grandchild holds the pipe.
                stderr=write_end,
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
                preexec_fn=_binding(self._processors),
            )
        except BaseException:
            transport.close()
            raise
        finally:
            os.close(write_end)
        self._started, self._ended = time.monotonic(), None
        self._tail.clear()
        self._reason = ""
        self._relay = asyncio.create_task(self._relay_stderr(reader, transport))
        self._relays.add(self._relay)
        self._relay.add_done_callback(self._relays.discard)

    async def wait(self) -> None:
        """Returns when the process has ended and its last lines were read."""
        assert self._process is not None
        assert self._relay is not None
        await self._process.wait()
        if self._ended is None:
            self.kill()  # processes it left, which may hold memory and the pipe below
            self._ended = time.monotonic()
        await asyncio.wait([self._relay], timeout=1)

    async def stop(self, patience: float, *, at_once: bool = False) -> None:
        """Asks the process to end; kills it and those it started after `patience` seconds.

        At once: it is asked twice, by which a service ends its calls with an error.
        """
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        if at_once:
            self.hurry()
        try:
            await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            logger.error("%s did not end within %.0f s; killing it", self.name, patience)
            self.kill()
        await self.wait()

    def hurry(self) -> None:
        """Asks the process to end, once more: at its second signal a service ends its calls."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)  # two of one number may arrive as one

    def kill(self, reason: str = "") -> None:
        """Kills the process and those it started, unless `wait` has done so."""
        self._reason = reason or self._reason
        if self._process is not None and self._ended is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def age(self) -> float:
        """How long the process lived, or has lived so far, in seconds."""
        return (self._ended or time.monotonic()) - self._started

    def ending(self) -> str:
        """Describes how the process ended, with its own last words on stderr."""
        assert self._process is not None
        if self._reason:
            return f"{self.name} was killed: {self._reason}"
        how = _ending(self._process.returncode)
        if self._process.returncode == -signal.SIGKILL:
            return f"{self.name} {how}"  # it could not report why
        words = self._last_words()
        return f"{self.name} {how}: {words}" if words else f"{self.name} {how}"

    def _last_words(self) -> str:
        """The line in which a command of ours gives its error, or else the last line, if recent."""
        own = f"tokenwire {self.role}: "
        since = (self._ended or time.monotonic()) - _LAST_WORDS_S
        said = [(written, message_of(line)) for written, line in self._tail]
        # Of any age: a process may take seconds to end after it.
        errors = [line.removeprefix(own) for _, line in said if line.startswith(own)]
        recent = [line for written, line in said if written >= since]
        return (errors or recent or [""])[-1]

    async def _relay_stderr(
        self, reader: asyncio.StreamReader, transport: asyncio.BaseTransport
    ) -> None:
        """Passes on whole lines, so that those of two children do not mix."""
        rest = b""
        with contextlib.closing(transport):
            while chunk := await reader.read(_CHUNK_BYTES):
                rest += chunk
                # A progress bar ends its lines with \r; a line without any end is cut.
                end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
                end = len(rest) if end == 0 and len(rest) > _CHUNK_BYTES else end
                self._pass_on(rest[:end])
                rest = rest[end:]
        self._pass_on(rest)

    def _pass_on(self, output: bytes) -> None:
        text = output.decode(errors="replace")
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stderr.write(text)
            sys.stderr.flush()
        now = time.monotonic()
        self._tail.extend((now, line) for line in map(str.strip, text.splitlines()) if line)


def _binding(processors: frozenset[int]) -> Callable[[], None] | None:
    """What a child does before it runs its command."""
    bind = die_with_parent(os.getpid())
    if not processors:
        return bind

    def bind_to_processors() -> None:
        os.sched_setaffinity(0, processors)
        if bind is not None:
            bind()

    return bind_to_processors


async def _open_pipe() -> tuple[asyncio.StreamReader, asyncio.BaseTransport, int]:
    """Returns the reading end of a new pipe, the transport that closes it, and the writing end."""
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb", buffering=0)
    )
    return reader, transport, write_end


def _ending(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"ended with status {returncode}"
    if returncode == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by {signal.Signals(-returncode).name}"
