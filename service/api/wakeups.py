"""An event loop that is woken once for many finished operations of gRPC, and says when it is idle.

A thread of grpc.aio writes a byte into a socket for each operation that is finished, and the loop
handles all that are finished whenever it reads one byte. After a step of the engine, which is an
operation for each stream, all bytes but the first would wake it for nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVarTuple

from ..workers.courtesy import IdleSelector

_Ts = TypeVarTuple("_Ts")
_COUNT = struct.Struct("i")
# Of grpc.aio; were they named otherwise, nothing would change.
_SOURCE, _THREAD = "PollerCompletionQueue", "_poll_wrapper"


class GrpcEventLoop(asyncio.SelectorEventLoop):
    """asyncio's own event loop, for a server of grpc.aio with threads that compute."""

    def __init__(self) -> None:
        super().__init__(IdleSelector())

    def add_reader(self, fd: Any, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """See asyncio."""
        function = callback.func if isinstance(callback, partial) else callback
        if type(getattr(function, "__self__", None)).__name__ == _SOURCE:
            super().add_reader(fd, handle_once, fd, partial(callback, *args))
            _let_loop_go_first()
        else:
            super().add_reader(fd, callback, *args)


def _let_loop_go_first() -> None:
    """Has the system not take the processor from the loop when gRPC's thread may run.

    It may after each message that the loop sends; so it handles those of a step together.
    """
    for thread in threading.enumerate():
        if _THREAD in thread.name and thread.native_id is not None:
            with suppress(OSError):  # where a sandbox forbids it
                os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))


def handle_once(waking: socket.socket, handle: Callable[[], object]) -> None:
    """Handles what is finished, after all bytes that stand for it but the one that `handle` reads.

    What is finished meanwhile has a byte of its own, or has been handled when that is read.
    """
    (count,) = _COUNT.unpack(fcntl.ioctl(waking, termios.FIONREAD, bytes(_COUNT.size)))
    if count > 1:
        waking.recv(count - 1)
    handle()
