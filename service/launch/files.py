"""Checks at the start what the processes would find out one by one, after seconds of imports."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..access.keys import read_keys
from ..checkpoint.directory import check_checkpoint
from .options import flag
from .settings import Settings


def check_files(settings: Settings) -> None:
    """Checks the directories of model and adapters, the keys, and the certificates of both ports.

    Raises:
        ValueError: one cannot be used; the text is one line with the option and the file.
        SettingsError: OpenTelemetry's variables say what cannot be done.
    """
    check_model(settings)
    if (path := settings.tokenizer_config_path) is not None:
        _check("tokenizer_config_path", path.read_bytes)
    if (keys := settings.api_key_file) is not None:
        _check("api_key_file", lambda: read_keys(keys))
    if (admins := settings.admin_key_file) is not None:
        _check("admin_key_file", lambda: read_keys(admins))
    if (adapters := settings.lora_adapter_directory) is not None:
        _check("lora_adapter_directory", lambda: _check_is_directory(adapters))
    if settings.grpc_tls is not None:
        _check("grpc_tls_certificate", settings.grpc_tls.check)
    check_public_certificates(settings)
    for export in (settings.trace_export(os.environ), settings.metric_export(os.environ)):
        if export is not None:
            export.check()


def check_public_certificates(settings: Settings) -> None:
    """Checks the certificates of the public port alone.

    Raises:
        ValueError: see `check_files`.
    """
    if settings.tls is not None:
        _check("tls_certificate", settings.tls.check)


def check_model(settings: Settings) -> None:
    """Checks a local model, as far as it shows without loading it.

    Raises:
        ValueError: it cannot be loaded; the text is one line with the path of what is wrong.
    """
    _check("model_id", lambda: check_checkpoint(settings.model_path))


def _check_is_directory(path: Path) -> None:
    if not path.is_dir():
        raise NotADirectoryError(f"there is no such directory: {path}")


def _check(name: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag(name)}: {error}") from error
