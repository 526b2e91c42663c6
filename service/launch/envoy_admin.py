"""Envoy's admin interface: what a running Envoy is told and asked.

Everywhere `admin` is the path of its socket, or its port on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path

_HEALTHY_SERVICES = "cluster.service.membership_healthy"  # names of Envoy's numbers
_CALLS = "http.gateway.downstream_rq_active"
_ANSWER_S = 2.0  # for an answer
_POLL_S = 0.1
VARIABLE = "TOKENWIRE_GATEWAY_ADMIN"  # which the supervisor sets: it is nobody's setting


def environment(admin: Path | int) -> dict[str, str]:
    """Tells a service process where the Envoy before it is asked."""
    return {VARIABLE: str(admin)}


async def drain(admin: Path | int) -> None:
    """Lets Envoy ask its clients to open other connections: they are served until then.

    Raises:
        OSError: it cannot be reached, or refuses.
    """
    await _tell(admin, "/drain_listeners?graceful&skip_exit")


async def close_port(admin: Path | int) -> None:
    """Lets Envoy take no new connections; those that it has stay.

    Raises:
        OSError: it cannot be reached, or refuses.
    """
    await _tell(admin, "/drain_listeners")


async def num_calls(admin: Path | int) -> int:
    """Returns how many calls of clients have not ended.

    Raises:
        OSError: Envoy cannot be reached.
    """
    return await _number(admin, _CALLS)


async def until_taken(socket: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Returns when the Envoy before a service process, if there is one, has taken all its replies.

    Args:
        socket: on which the process takes Envoy's calls.
        environment: where it was told of Envoy.

    Raises:
        OSError: Envoy cannot be reached.
    """
    if text := environment.get(VARIABLE, ""):
        admin = int(text) if text.isdecimal() else Path(text)
        while await _num_open(admin, socket):  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(_POLL_S)


async def _num_open(admin: Path | int, socket: Path) -> int:
    """How many calls to a service process Envoy has, one whose reply it holds included."""
    _, body = await _ask(admin, "GET /clusters")
    active = re.findall(f"::{re.escape(str(socket))}::rq_active::(\\d+)".encode(), body)
    return sum(map(int, active))


async def num_healthy(admin: Path | int) -> int:
    """Returns how many service processes Envoy has found well.

    Raises:
        OSError: Envoy cannot be reached.
    """
    return await _number(admin, _HEALTHY_SERVICES)


async def is_alive(admin: Path | int) -> bool:
    """Whether Envoy answers, whatever it says.

    Raises:
        OSError: it does not; a timeout is one, too.
    """
    status, _ = await _ask(admin, "GET /ready")
    return bool(status)


async def _tell(admin: Path | int, command: str) -> None:
    status, _ = await _ask(admin, f"POST {command}")
    if status != b"200":
        raise OSError(f"Envoy does not drain: {status!r}")


async def _number(admin: Path | int, name: str) -> int:
    """One of Envoy's numbers; 0 for one that it does not have yet."""
    _, body = await _ask(admin, f"GET /stats?filter=^{name}$")
    found = re.search(rf"{name}: (\d+)".encode(), body)
    return int(found[1]) if found else 0


async def _ask(admin: Path | int, request: str) -> tuple[bytes, bytes]:
    """Status and body of an answer of the admin interface."""
    async with asyncio.timeout(_ANSWER_S):
        if isinstance(admin, int):
            reader, writer = await asyncio.open_connection("127.0.0.1", admin)
        else:
            reader, writer = await asyncio.open_unix_connection(admin)
        try:
            writer.write(f"{request} HTTP/1.1\r\nHost: admin\r\n".encode())
            writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    return (*head.split(b" ", 2), b"", b"")[1], body
