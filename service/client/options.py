"""The options that say which server is meant, and what it may ask for.

Of variables only API_KEY is read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..launch.options import SettingsError
from .credentials import Credentials
from .target import parse_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the server's address and what it may ask for."""
    parser.add_argument(
        "--target",
        type=checked(parse_target),
        default="http://127.0.0.1:8080",
        metavar="URL",
        help="http://host:port or https:// for REST, grpc://host:port or grpcs:// for gRPC "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="the server's API key (default: the variable API_KEY, which other users cannot see)",
    )
    for name, text in (
        ("ca", "PEM of who signs the server's certificate; otherwise the system's authorities"),
        ("cert", "PEM chain of our own certificate, where the server asks for one"),
        ("key", "PEM key of our own certificate"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)


def credentials_of(arguments: dict[str, Any]) -> Credentials:
    """Returns what the options, or the variable, give.

    Raises:
        SettingsError: a certificate is given without its key, or a key alone.
    """
    certificate, key = arguments["tls_cert"], arguments["tls_key"]
    if (certificate is None) != (key is None):
        raise SettingsError("--tls-cert and --tls-key must be given together")
    api_key = arguments["api_key"] or os.environ.get("API_KEY") or None
    return Credentials(api_key, arguments["tls_ca"], certificate, key)


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wraps a parser of values so that argparse shows the text of its ValueError."""

    def checked_value(raw: str) -> Any:
        try:
            return read(raw)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked_value
