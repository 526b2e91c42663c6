"""Certificates in PEM files: checked before they are used, and read again when they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .watched import Watched


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a port needs to speak TLS.

    Attributes:
        certificate: the server's chain, its own certificate first.
        key: the key of that certificate, without a password.
        client_ca: who signs the certificates of callers; None if callers need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        pair = (self.certificate, self.key)
        return pair if self.client_ca is None else (*pair, self.client_ca)

    def check(self) -> None:
        """Checks that the files can be used.

        Raises:
            OSError: one cannot be read; the text is one line that names it.
            ValueError: one is broken, or certificate and key do not belong together.
        """
        for path in self.paths:
            _check_readable(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=self._no_password)
        except ssl.SSLError as error:
            what = error.reason or "no certificate, or no key"
            raise ValueError(f"{self.certificate} and {self.key}: {_readable(what)}") from error
        if self.client_ca is not None:
            _check_authority(context, self.client_ca)

    def _no_password(self) -> str:
        raise ValueError(f"{self.key}: has a password, for which nobody can be asked")


def check_client_files(authority: Path | None, certificate: Path | None, key: Path | None) -> None:
    """Checks what we believe and show as a client, as far as there is something.

    Raises:
        OSError: a file cannot be read; the text is one line that names it.
        ValueError: one is broken, or certificate and key do not belong together.
    """
    if certificate is not None and key is not None:
        TlsFiles(certificate, key, authority).check()
    elif authority is not None:
        _check_readable(authority)
        _check_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), authority)


def server_credentials(files: TlsFiles) -> Any:
    """Returns the credentials of a gRPC port, which takes new files for new connections.

    Raises:
        OSError, ValueError: see `TlsFiles.check`.
    """
    import grpc  # here, because the commands that only check the files need no gRPC

    def read() -> Any:
        files.check()
        authority = None if files.client_ca is None else files.client_ca.read_bytes()
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], authority)

    watched = Watched("the certificates of the gRPC port", files.paths, read)
    return grpc.dynamic_ssl_server_credentials(
        watched.current(), watched.current, files.client_ca is not None
    )


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error


def _check_authority(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{path}: {_readable(error.reason or 'no certificate')}") from error


def _readable(reason: str) -> str:
    """OpenSSL's reasons are spelt like KEY_VALUES_MISMATCH."""
    return reason.replace("_", " ").lower()
