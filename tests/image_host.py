"""A host of images on this machine, that does what a test wants of it."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socket import socket
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

Answer = Callable[[socket], None]  # writes to a connection


def ok(data: bytes, *headers: str) -> Answer:
    """An answer with a file."""
    return _said("200 OK", data, *headers)


def status(line: str, *headers: str, data: bytes = b"secret") -> Answer:
    """An answer with another status."""
    return _said(line, data, *headers)


def moved(location: str, line: str = "302 Found") -> Answer:
    """An answer that says where the file is."""
    return _said(line, b"secret", f"location: {location}")


def endless(connection: socket) -> None:
    """An answer that does not say how long it is, and has no end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def _said(line: str, data: bytes, *headers: str) -> Answer:
    head = [f"HTTP/1.1 {line}", f"content-length: {len(data)}", *headers]
    whole = "\r\n".join(head).encode() + b"\r\n\r\n" + data
    return lambda connection: connection.sendall(whole)


@dataclass
class ImageHost:
    """The host.

    Attributes:
        port: on 127.0.0.1.
        answers: by path.
        requests: the heads of the requests so far.
        is_asked: set once there is one.
        is_left: set once a caller has gone whom nobody answered.
    """

    port: int = 0
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    is_asked: threading.Event = field(default_factory=threading.Event)
    is_left: threading.Event = field(default_factory=threading.Event)

    @property
    def place(self) -> str:
        """Its entry in a list of hosts."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str, scheme: str = "http", name: str = "127.0.0.1") -> str:
        """Of a file."""
        return f"{scheme}://{name}:{self.port}{path}"

    def hang(self, connection: socket) -> None:
        """No answer, until the caller goes."""
        with suppress(OSError):
            connection.recv(1)
        self.is_left.set()

    def serve(self, connection: socket) -> None:
        """Answers the requests of a connection, one after the other."""
        while head := _head(connection):
            self.requests.append(head)
            self.is_asked.set()
            self.answers[head.split(" ")[1]](connection)


def _head(connection: socket) -> str:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        part = connection.recv(1)
        if not part:
            return ""
        data += part
    return data.decode("latin-1")


@contextmanager
def image_host(tls: ssl.SSLContext | None = None) -> Iterator[ImageHost]:
    """A host, on a free port; `tls` if it speaks https."""
    host = ImageHost()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                connection: Any = self.request
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                host.serve(connection)

    class Server(ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        host.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield host
        finally:
            server.shutdown()
            thread.join()
