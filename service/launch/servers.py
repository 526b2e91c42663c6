"""Several whole servers behind one Envoy: where they are, and which of them gets a request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import is_ip_address

Affinity = Literal["session", "caller", "beginning"]

# What of a request says where it goes, by headers. A script makes the last one.
BEGINNING_HEADER = "x-tokenwire-beginning"
_HEADERS: dict[Affinity, tuple[str, ...]] = {
    "session": ("x-session-id",),
    "caller": ("authorization", "x-api-key"),
    "beginning": (BEGINNING_HEADER,),
}

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")  # a part of a DNS name
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server takes Envoy's calls. All addresses of a DNS name are servers."""

    host: str
    port: int

    @property
    def is_name(self) -> bool:
        """Whether the host has to be resolved."""
        return not is_ip_address(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Reads `host:port`, where an IPv6 address stands in brackets.

    Raises:
        ValueError: it is none.
    """
    found = _ADDRESS.fullmatch(text.strip())
    if found is None or not 0 < int(found["port"]) <= _MAX_PORT:
        raise ValueError(f"not an address host:port: {text!r}")
    v6, host = found["v6"], found["host"]
    if not (_is_v6(v6) if v6 else is_ip_address(host) or _is_name(host)):
        raise ValueError(f"neither an IP address nor a name: {text!r}")
    return Address(v6 or host, int(found["port"]))


def _is_v6(text: str) -> bool:
    return ":" in text and is_ip_address(text)


def _is_name(text: str) -> bool:
    """Whether a text is a DNS name, whose last part is never a number."""
    parts = text.removesuffix(".").split(".")
    return all(map(_NAME.fullmatch, parts)) and not parts[-1].isdecimal()


def parse_addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Reads several addresses.

    Raises:
        ValueError: one is wrong, or there more than once.
    """
    addresses = tuple(map(parse_address, texts))
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"{address} is there more than once")
    return addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The servers that an Envoy spreads requests over.

    Attributes:
        addresses: of their ports for Envoy, at the start.
        endpoints_file: where the operator writes them, if they change.
        resolvers: DNS servers that are asked for names instead of the system's.
        affinity: what of a request decides where it goes, the first that it has. If it is empty,
            the server with the fewest requests gets it.
        max_load: of a server whose turn it is by affinity, as a multiple of the average number of
            requests; beyond that another one gets the request.
    """

    addresses: tuple[Address, ...]
    endpoints_file: Path | None = None
    resolvers: tuple[Address, ...] = ()
    affinity: tuple[Affinity, ...] = ()
    max_load: float = 1.5

    @property
    def may_be_several(self) -> bool:
        """Whether a request that one server does not answer may be answered by another one."""
        changes = self.endpoints_file is not None
        return changes or len(self.addresses) > 1 or self.have_names

    @property
    def have_names(self) -> bool:
        """Whether an address has to be resolved."""
        return any(address.is_name for address in self.addresses)

    @property
    def hashed_headers(self) -> tuple[str, ...]:
        """The headers that affinity goes by, the first ones first."""
        return tuple(header for kind in self.affinity for header in _HEADERS[kind])

    @property
    def preceding_headers(self) -> tuple[str, ...] | None:
        """The headers that win over a request's beginning; None where that does not matter."""
        headers = self.hashed_headers
        if BEGINNING_HEADER not in headers:
            return None
        return headers[: headers.index(BEGINNING_HEADER)]
