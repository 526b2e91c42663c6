"""Settings in a file: TOML, with the names of the flags, for what is the same at every start."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from .options import Option, SettingsError, spell
from .settings import OPTIONS
from .unsupported import UNSUPPORTED

_KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


def read_config(path: Path) -> dict[str, list[str]]:
    """Reads a file; returns, by option name, what would stand behind the flag.

    Raises:
        SettingsError: it cannot be read, is no TOML, or has a key or a type of value that is wrong.
            The text is one line with the file and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or no TOML
        raise SettingsError(f"--config {path}: {error}") from error
    return dict(_entry(key, value, path) for key, value in content.items())


def _entry(key: str, value: Any, path: Path) -> tuple[str, list[str]]:
    option = _BY_NAME.get(key.replace("-", "_"))
    if option is None:
        raise SettingsError(f"{path}: {_unknown(key, value)}")
    values = value if isinstance(value, list) and option.is_list else [value]
    kind = get_args(option.kind)[0] if option.is_list else option.kind
    for item in values:
        if not _fits(item, kind):
            expected = _NAMES.get(kind, "a text")
            raise SettingsError(f"{path}: {key} must be {expected}. Given: {item!r}")
    return option.name, [text for item in values for text in spell(item)]


def _fits(value: Any, kind: Any) -> bool:
    expected = _KINDS.get(kind, (str,))
    return isinstance(value, expected) and (kind is bool or not isinstance(value, bool))


def _unknown(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"[{key}] is a table; all settings stand at the top"
    name = key.replace("-", "_")
    if name in UNSUPPORTED:
        return f"{key} is not supported: {UNSUPPORTED[name].reason}"
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    return f"unknown setting {key}" + (f"; did you mean {close[0]}?" if close else "")


def _by_name() -> Mapping[str, Option]:
    """Every option by its name and by its other name."""
    return {name: option for option in OPTIONS for name in option.names}


_BY_NAME = _by_name()
