"""A DNS server of one name, whose addresses tests change."""

from __future__ import annotations

import ipaddress
import socketserver
import struct
import threading
from typing import Self

_HEADER = struct.Struct(">6H")  # id, flags, and the number of records of four kinds
_RECORD = struct.Struct(">HHHIH4s")  # the name by its place, type, class, seconds, size, address
_QUESTION = 12  # where a message's first name is
_IS_REPLY, _FAILED = 0x8400, 2
_IPV4, _INTERNET = 1, 1


class NameServer:
    """Answers over UDP; whatever name is asked for has these IPv4 addresses, and no others.

    Attributes:
        addresses: those that it has now; None lets every question fail.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] | None = addresses
        self.num_failed = 0
        names = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                message, sock = self.request
                sock.sendto(names.reply(message), self.client_address)

        self._server = socketserver.UDPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, message: bytes) -> bytes:
        """The answer to a question."""
        number, *_ = _HEADER.unpack_from(message)
        end = message.index(b"\0", _QUESTION) + 5  # of the name, its type and its class
        question = message[_QUESTION:end]
        if self.addresses is None:
            self.num_failed += 1
            return _HEADER.pack(number, _IS_REPLY | _FAILED, 1, 0, 0, 0) + question
        kind, _ = struct.unpack(">HH", question[-4:])
        packed = [ipaddress.IPv4Address(it).packed for it in self.addresses if kind == _IPV4]
        records = [_RECORD.pack(0xC000 | _QUESTION, _IPV4, _INTERNET, 0, 4, it) for it in packed]
        head = _HEADER.pack(number, _IS_REPLY, 1, len(records), 0, 0)
        return head + question + b"".join(records)
