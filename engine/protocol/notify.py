"""Signs of life for the process that watches this one, in systemd's protocol (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

VARIABLE = "NOTIFY_SOCKET"  # the path of the watcher's datagram socket; absent if nobody watches
ALIVE = b"WATCHDOG=1"
READY = b"READY=1"


def notify(message: bytes) -> None:
    """Sends a message; does nothing without a watcher, or if it does not read just now."""
    path = os.environ.get(VARIABLE, "")
    if not path:
        return
    if path.startswith("@"):  # a name without a file
        path = "\0" + path[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(message, path)
