"""How a supervisor knows that a child is alive: signs of life, and how long they may be missing.

Engine and service give them by themselves, in systemd's protocol (`engine/protocol/notify.py`), the
engine only while its step thread gets on. Envoy is asked on its admin address.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.protocol.notify import READY, VARIABLE

_LOOK_S = 0.25  # between two looks
_MIN_START_S = 60.0  # patience with a child that is not ready yet: imports from a slow disk
_PROBE_S = 1.0  # a question that is not answered by then has failed
_MAX_MESSAGE_BYTES = 4096

Probe = Callable[[], Awaitable[bool]]


class Watch(Protocol):
    """What tells whether a child is alive."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for the child."""

    def begin(self) -> None:
        """The child starts, or starts again."""

    async def has_sign(self) -> bool:
        """Whether the child gave a sign of life since the last look."""

    @property
    def is_ready(self) -> bool:
        """Whether the child has finished its start."""


class Notifications:
    """A datagram socket on which a child says that it is alive.

    Args:
        path: where the socket is made, in a directory private to the user.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self._is_ready = False

    @property
    def environment(self) -> Mapping[str, str]:
        """Where the child finds the socket."""
        return {VARIABLE: str(self._path)}

    def begin(self) -> None:
        """Drops what an earlier child has left."""
        self._messages()
        self._is_ready = False

    async def has_sign(self) -> bool:
        """Whether there is a message."""
        messages = self._messages()
        self._is_ready |= READY in messages
        return bool(messages)

    @property
    def is_ready(self) -> bool:
        """Whether the child said so."""
        return self._is_ready

    def _messages(self) -> list[bytes]:
        messages = []
        with suppress(BlockingIOError):
            while True:
                messages.append(self._socket.recv(_MAX_MESSAGE_BYTES))
        return messages


class Probing:
    """Asks a child whether it is alive."""

    environment: Mapping[str, str] = {}

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.is_ready = False

    def begin(self) -> None:
        """Forgets the earlier child."""
        self.is_ready = False

    async def has_sign(self) -> bool:
        """Whether the child answers in time."""
        with suppress(OSError):  # a timeout is one, too
            async with asyncio.timeout(_PROBE_S):
                answers = await self._probe()
                self.is_ready |= answers
                return answers
        return False


@dataclass(slots=True)
class _Silence:
    """Seconds without a sign of life, as far as this process could have seen one."""

    seconds: float
    looked: float

    def look(self, has_sign: bool) -> None:
        """Counts a look. A pause of this process, such as a frozen container's, counts little."""
        now = time.monotonic()
        self.seconds = 0.0 if has_sign else self.seconds + min(now - self.looked, 2 * _PROBE_S)
        self.looked = now


async def until_silent(watch: Watch, patience: float) -> float:
    """Returns when a child has given no sign of life for too long; how long that was, in seconds.

    Args:
        watch: of the child, which has just been started.
        patience: seconds, once it is ready.
    """
    silence = _Silence(0.0, time.monotonic())
    while True:
        await asyncio.sleep(_LOOK_S)
        silence.look(await watch.has_sign())
        if silence.seconds >= (patience if watch.is_ready else max(patience, _MIN_START_S)):
            return silence.seconds
