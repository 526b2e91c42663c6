"""What Envoy's admin interface is asked, of an interface that has answers ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.launch import envoy_admin

OWN = Path("/run/gateway-1.sock")
CLUSTERS = """\
service::/run/gateway-1.sock::cx_active::1
service::/run/gateway-1.sock::rq_active::{}
service::/run/gateway-1.sock::rq_total::7
service::/run/gateway-11.sock::rq_active::5
operators::/run/gateway-1.sock::rq_active::{}
"""


@asynccontextmanager
async def interface(path: Path, *bodies: str) -> AsyncGenerator[list[str]]:
    """Gives one body after the other, the last one for ever; yields what is asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split(b" ", 2)[1].decode())
        body = bodies[min(len(asked), len(bodies)) - 1]
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{body}".encode())
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        yield asked


async def test_calls_of_a_process_that_envoy_has_are_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with interface(path, CLUSTERS.format(2, 0), CLUSTERS.format(0, 1), CLUSTERS.format(0, 0)):
        async with asyncio.timeout(20):
            await envoy_admin.until_taken(OWN, envoy_admin.environment(path))


async def test_calls_of_other_processes_are_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with interface(path, CLUSTERS.format(0, 0)) as asked:
        await envoy_admin.until_taken(OWN, envoy_admin.environment(path))
    assert asked == ["/clusters"]


async def test_an_envoy_that_nobody_has_named_is_not_waited_for() -> None:
    await envoy_admin.until_taken(OWN, {})


async def test_an_envoy_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        await envoy_admin.until_taken(OWN, envoy_admin.environment(tmp_path / "nobody"))


async def test_a_port_is_asked_as_a_socket_is() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + CLUSTERS.format(0, 0).encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await envoy_admin.until_taken(OWN, envoy_admin.environment(port))
