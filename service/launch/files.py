"""Checks at the start what the processes would find out one by one, after seconds of imports."""

from __future__ import annotations

from collections.abc import Callable

from ..access.keys import read_keys
from .options import flag
from .settings import Settings


def check_files(settings: Settings) -> None:
    """Checks the file of API keys, and the certificates of both ports.

    Raises:
        ValueError: one cannot be used; the text is one line with the option and the file.
    """
    if settings.api_key_file is not None:
        path = settings.api_key_file
        _check("api_key_file", lambda: read_keys(path))
    if settings.grpc_tls is not None:
        _check("grpc_tls_certificate", settings.grpc_tls.check)
    check_public_certificates(settings)


def check_public_certificates(settings: Settings) -> None:
    """Checks the certificates of the public port alone.

    Raises:
        ValueError: see `check_files`.
    """
    if settings.tls is not None:
        _check("tls_certificate", settings.tls.check)


def _check(name: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag(name)}: {error}") from error
