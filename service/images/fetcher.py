"""Fetches images from the hosts that the operator lists, and from nowhere else.

A host may be slow, answer without end, or send callers elsewhere. So each image has a deadline and
a size, callers take turns, and what is fetched counts against a budget while it is held. Nothing of
an answer is ever repeated in an error.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from httpcore2 import (
    URL,
    AsyncConnectionPool,
    NetworkError,
    ProtocolError,
    Response,
    TimeoutException,
    default_ssl_context,
)

from ..access.media_hosts import MediaHosts
from ..errors import ServiceError, overloaded
from ..workers.turns import Turns
from .data_url import invalid
from .public_network import HostError, Names, PublicNetwork, Resolve
from .target import Target

_NUM_PLACES = 64  # images that are fetched at a time
_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_IDLE_S = 10.0  # that a connection stays open for the next image
_HEADERS = [
    (b"accept", b"image/png, image/jpeg, image/webp, image/gif, image/bmp"),
    (b"accept-encoding", b"identity"),
    (b"user-agent", b"tokenwire"),
]


class ImageFetcher:
    """Fetches images. Variables of the environment that name proxies mean nothing to it.

    Args:
        hosts: from which images may come.
        max_bytes: of an image.
        deadline_s: seconds that one may take, redirects and waiting for a turn included.
        resolve: gives the addresses of names; otherwise the system is asked.
        tls: whose certificates are believed; otherwise the system's authorities, or those of
            `SSL_CERT_FILE`.
    """

    def __init__(
        self,
        hosts: MediaHosts,
        *,
        max_bytes: int,
        deadline_s: float,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._deadline_s = deadline_s
        self._turns = Turns(_NUM_PLACES)
        self._pool = AsyncConnectionPool(
            ssl_context=tls or default_ssl_context(),
            max_connections=2 * _NUM_PLACES,
            max_keepalive_connections=_NUM_PLACES,
            keepalive_expiry=_IDLE_S,
            network_backend=PublicNetwork(resolve or Names()),
        )

    async def close(self) -> None:
        """Closes connections."""
        await self._pool.aclose()

    async def fetch(self, url: str, field: str, take: Callable[[int], None]) -> bytes:
        """The file at a URL.

        Args:
            url: of any form.
            field: where it stands in the request.
            take: told of bytes as they come, so that they are counted where they are held.

        Raises:
            ServiceError: it may not be fetched, cannot be, takes too long or is too large; or too
                many wait.
        """
        is_waiting = True
        try:
            async with asyncio.timeout(self._deadline_s), self._turns.place():
                is_waiting = False
                return await self._followed(url, field, take)
        except (TimeoutError, TimeoutException):
            if is_waiting:
                raise overloaded() from None
            raise invalid(field, f"cannot be fetched within {self._deadline_s:g} s") from None
        except HostError as error:
            raise invalid(field, f"cannot be fetched: {error}") from None
        except (NetworkError, ProtocolError, OSError):
            raise invalid(field, "cannot be fetched: the connection to its host failed") from None

    async def _followed(self, url: str, field: str, take: Callable[[int], None]) -> bytes:
        """The file at a URL, or where its host says that it is."""
        try:
            target = self._allowed(Target.of(url))
        except ValueError as error:
            raise invalid(field, str(error)) from None
        for _ in range(_MAX_REDIRECTS + 1):
            found = await self._answer(target, field, take)
            if isinstance(found, bytes):
                return found
            try:
                target = self._allowed(target.redirected(found))
            except ValueError as error:
                raise invalid(field, f"is redirected to a URL that {error}") from None
        raise invalid(field, f"is redirected more than {_MAX_REDIRECTS} times")

    def _allowed(self, target: Target) -> Target:
        """The same target.

        Raises:
            ValueError: the operator does not list it.
        """
        if (target.host, target.port) not in self._hosts:
            raise ValueError("has a host or a port from which this server fetches no images")
        return target

    async def _answer(self, target: Target, field: str, take: Callable[[int], None]) -> bytes | str:
        """The file at a target, or the place that it has moved to."""
        url = URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        headers = [(b"host", target.authority.encode()), *_HEADERS]
        async with self._pool.stream("GET", url, headers=headers) as response:
            said = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in said:
                return said[b"location"]
            if response.status != 200:
                reason = f"cannot be fetched: its host answers with status {response.status}"
                raise invalid(field, reason)
            if said.get(b"content-encoding", "identity") != "identity":
                raise invalid(field, "cannot be fetched: its host sends it compressed")
            return await self._read(response, said.get(b"content-length", ""), field, take)

    async def _read(
        self, response: Response, announced: str, field: str, take: Callable[[int], None]
    ) -> bytes:
        """The body of an answer, as far as it may be read."""
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise too_large(field, self._max_bytes)
        parts, num_bytes = [], 0
        async for part in response.aiter_stream():
            num_bytes += len(part)
            if num_bytes > self._max_bytes:
                raise too_large(field, self._max_bytes)
            take(len(part))
            parts.append(part)
        return b"".join(parts)


def too_large(field: str, max_bytes: int) -> ServiceError:
    """The error of an image whose file is too large."""
    return invalid(field, f"must have at most {max_bytes} bytes")
