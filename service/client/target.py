"""The address of the server, and the protocol to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

_SCHEMES: dict[str, tuple[Literal["rest", "grpc"], bool]] = {
    "http": ("rest", False),
    "https": ("rest", True),
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
}


class TargetError(ConnectionError):
    """The target cannot be used; `str()` is one line that says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address.

    Attributes:
        url: as it was given.
        transport: the protocol.
        secure: whether TLS is used.
    """

    url: str
    transport: Literal["rest", "grpc"]
    secure: bool

    @property
    def authority(self) -> str:
        """Host and port, as gRPC wants them."""
        return urlsplit(self.url).netloc


def parse_target(raw: str) -> Target:
    """Returns the target that a URL names.

    Raises:
        ValueError: it is not the URL of one.
    """
    parts = urlsplit(raw)
    if parts.scheme not in _SCHEMES or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"must be like http://host:8080 or grpc://host:50051. Given: {raw}")
    transport, secure = _SCHEMES[parts.scheme]
    if transport == "grpc" and (parts.port is None or parts.path not in ("", "/")):
        raise ValueError(f"must be a host and a port, like grpc://host:50051. Given: {raw}")
    return Target(raw, transport, secure)
