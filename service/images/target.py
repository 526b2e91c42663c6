"""The place on the network that an http or https URL names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import punctuation
from urllib.parse import SplitResult, quote, urljoin, urlsplit

_PORTS = {"http": 80, "https": 443}
_MAX_CHARS = 8192
_NOT_IN_URLS = re.compile(r"[\0- \\\x7f]")


@dataclass(frozen=True, slots=True)
class Target:
    """A place that a file can be fetched from.

    Attributes:
        scheme: http or https.
        host: name or address in lower case, IPv6 without brackets.
        port: explicit or the scheme's.
        path: with the query, quoted.
    """

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Target:
        """Reads a URL.

        Raises:
            ValueError: it has another form. The text goes on after the URL's name.
        """
        if len(url) > _MAX_CHARS:
            raise ValueError(f"has more than {_MAX_CHARS} characters")
        if _NOT_IN_URLS.search(url):
            raise ValueError("has a space, a backslash or a control character")
        try:
            parts = urlsplit(url)
            port, path = parts.port, _quoted(parts)
        except ValueError:
            raise ValueError("is not a URL") from None
        if parts.scheme not in _PORTS:
            raise ValueError("is neither a data: URL nor an http: or https: URL")
        if "@" in parts.netloc:
            raise ValueError("has the name of a user in it")
        port = _PORTS[parts.scheme] if port is None else port
        return cls(parts.scheme, parts.hostname or "", port, path)

    def redirected(self, location: str) -> Target:
        """The place that an answer from this one refers to.

        Raises:
            ValueError: the same as from `of`, or it gives up encryption.
        """
        try:
            url = urljoin(f"{self.scheme}://{self.authority}{self.path}", location)
        except ValueError:
            raise ValueError("is not a URL") from None
        target = Target.of(url)
        if self.scheme == "https" != target.scheme:
            raise ValueError("is not encrypted")
        return target

    @property
    def authority(self) -> str:
        """Host and port, as the header `host` has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def _quoted(parts: SplitResult) -> str:
    """Path and query, with everything quoted that is not ASCII."""
    query = f"?{parts.query}" if parts.query else ""
    return quote((parts.path or "/") + query, safe=punctuation)
