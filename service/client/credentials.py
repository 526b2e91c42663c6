"""What a client shows to be let in, and whose certificates it believes."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Credentials:
    """What to connect with.

    Attributes:
        api_key: the key; None sends none.
        ca: PEM of who signs the server's certificate; None believes whom the system believes.
        certificate: PEM chain of the client's own certificate, if it has one.
        key: PEM key of that certificate.
    """

    api_key: str | None = field(default=None, repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Headers over REST, metadata over gRPC."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def ssl_context(self) -> ssl.SSLContext:
        """For REST.

        Raises:
            OSError: a file cannot be read, or is no certificate.
        """
        context = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context

    def channel_credentials(self) -> Any:
        """For gRPC.

        Raises:
            OSError: a file cannot be read.
        """
        import grpc  # here, because the command's options are read without it

        ca, key, certificate = map(_content, (self.ca, self.key, self.certificate))
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
