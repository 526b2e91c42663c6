"""Connections to addresses that were looked at before.

A name is resolved once, and its connection is made to what it resolved to: a second look could
find another address. So nobody who has a say in a name's addresses can make this server connect
to a network that only it can reach.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from httpcore2 import (
    AnyIOBackend,
    AsyncNetworkBackend,
    AsyncNetworkStream,
    ConnectError,
    ConnectTimeout,
)

# What gives the addresses of a name, for a port.
Resolve = Callable[[str, int], Awaitable[list[str]]]

_LOCALHOST = "localhost"
_NUM_THREADS = 8  # that wait for a name server
_CONNECT_S = 3.0  # for one of several addresses
_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")  # an IPv4 address in its last four bytes
_TUNNELS = (ip_network("2002::/16"), ip_network("2001::/32"))  # 6to4 and Teredo: likewise, inside
_OF_PLATFORM = ip_address("168.63.129.16")  # looks public: Azure's services for its own machines


class HostError(Exception):
    """A name cannot be connected to; `str()` says why."""


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, and one machine's own."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFF_FFFF)
        elif ip not in _UNICAST or any(ip in tunnel for tunnel in _TUNNELS):
            return False
    is_special = ip.is_multicast or ip.is_reserved or ip == _OF_PLATFORM
    return ip.is_global and not is_special


class Names:
    """Asks the system for the addresses of names, in threads of their own.

    A name server that does not answer holds up nothing but other names.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="names")

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of a name.

        Raises:
            OSError: it has none.
        """
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(place[0]) for *_, place in found))


class PublicNetwork(AsyncNetworkBackend):
    """Connects to names with public addresses only; `localhost` and addresses mean themselves.

    Args:
        resolve: gives the addresses of names.
    """

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._network = AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        """Connects to the first of a name's addresses that answers.

        Raises:
            HostError: the name has no address that may be connected to.
            ConnectError, ConnectTimeout: none answers.
        """
        *others, last = await self._addresses(host, port)
        for address in others:
            try:
                return await self._network.connect_tcp(
                    address, port, _CONNECT_S, local_address, socket_options
                )
            except (ConnectError, ConnectTimeout):
                continue
        return await self._network.connect_tcp(last, port, timeout, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """What may be connected to, at least one.

        Raises:
            HostError: the name is not known, or one of its addresses is not public.
        """
        if _is_address(host):
            return [host]
        try:
            found = await self._resolve(host, port)
        except OSError:
            raise HostError("its host is not known") from None
        may_be = _is_loopback if host == _LOCALHOST else is_public
        if not found or not all(map(may_be, found)):
            raise HostError("its host has an address that is not public")
        return found


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback
