"""The worker's side: reads requests from standard input and writes answers to standard output."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import msgpack

from engine.protocol.wire import HEADER, framed

from ..parent import die_with_parent
from .heap import trim

Answer = Callable[[Any], Any]

_LARGE_BYTES = 1 << 20  # of an answer, after which memory is given back


def serve(start: Callable[[Any], Answer]) -> None:
    """Serves until the input ends. The process's one argument is its memory limit, in bytes.

    Args:
        start: takes the setup; returns what answers a request.
    """
    bind = die_with_parent(os.getppid())
    if bind is not None:
        bind()  # even while it works
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file when it runs out of memory
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    answer = start(_read(source))
    _write(sink, None)  # ready
    while (request := _read(source)) is not None:
        num_bytes = _write(sink, answer(request))
        del request
        if num_bytes > _LARGE_BYTES:
            trim()


def _write(stream: BinaryIO, message: Any) -> int:
    """Sends a message; returns its bytes."""
    frame = framed(message)
    stream.write(frame)
    stream.flush()
    return len(frame)


def _read(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return msgpack.unpackb(stream.read(HEADER.unpack(header)[0]), strict_map_key=False)
