"""The worker's side: reads requests and writes answers, and forks if there shall be several."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import msgpack
import psutil

from engine.protocol.c_heap import trim
from engine.protocol.wire import HEADER, framed

from ..parent import die_with_parent

# The answer to a request. An iterator's items are sent as they come; the last one is the answer.
Answer = Callable[[Any], Any]

_LARGE_BYTES = 1 << 20  # of an answer, after which memory is given back


def serve(start: Callable[[Any], Answer]) -> None:
    """Serves standard input until it ends.

    Its arguments are a memory limit, in bytes, and the number of the parent: it may have ended, and
    another process taken its place, while this one was still importing.

    Args:
        start: takes the setup; returns what answers a request.
    """
    _bind(int(sys.argv[2]))
    _limit_memory(int(sys.argv[1]))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    answer = start(_read(source))
    try:
        _write(sink, None)  # ready
        _answer_all(source, sink, answer)
    except BrokenPipeError:  # the parent has ended, and wants no answer
        os._exit(0)  # else Python tries once more to write what is left, and says so


def serve_forks(start: Callable[[Any], tuple[Any, Callable[[], Answer]]]) -> None:
    """Forks for each socket that comes over standard input, itself a socket, until that ends.

    Its arguments are how many bytes of memory a forked process may add to what it is born with, and
    the number of the parent.

    Args:
        start: takes the setup; returns a report, and what makes a forked process's answers. Until
            the fork it must start no threads.
    """
    _bind(int(sys.argv[2]))
    own = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets those that have ended
    with socket.socket(fileno=sys.stdin.fileno()) as listener:
        with listener.makefile("rb") as source:
            report, make_answer = start(_read(source))
        trim()
        gc.collect()
        gc.freeze()  # a collection would write to all objects, and make copies of their memory
        listener.sendall(framed(report))
        while (received := socket.recv_fds(listener, 1, 1))[0]:
            with socket.socket(fileno=received[1][0]) as connection:
                if not (pid := os.fork()):
                    listener.close()
                    _serve_fork(own, connection, make_answer)
            listener.sendall(framed(pid))


def _serve_fork(parent: int, connection: socket.socket, make_answer: Callable[[], Answer]) -> None:
    """Serves a connection in a process that was just forked, and ends it."""
    try:
        _bind(parent)
        _limit_memory(psutil.Process().memory_info().vms + int(sys.argv[1]))
        with connection.makefile("rb") as source, connection.makefile("wb") as sink:
            answer = make_answer()
            _write(sink, None)  # ready
            _answer_all(source, sink, answer)
    finally:
        os._exit(0)  # what the process was forked of would run on here


def _answer_all(source: BinaryIO, sink: BinaryIO, answer: Answer) -> None:
    while (request := _read(source)) is not None:
        answered = answer(request)
        messages = answered if isinstance(answered, Iterator) else (answered,)
        num_bytes = sum(_write(sink, message) for message in messages)
        del request, answered, messages
        if num_bytes > _LARGE_BYTES:
            trim()


def _bind(parent: int) -> None:
    """Binds this process to its parent, and not to a terminal, which sends SIGINT to all."""
    bind = die_with_parent(parent)
    if bind is not None:
        bind()  # even while it works
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit_memory(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file when it runs out of memory


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
