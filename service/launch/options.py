"""One option of the command line: its names, and how its value is parsed, checked and written.

The options themselves are the fields of `Settings`; only `log_level` is treated specially here.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

PREFIX = "TOKENWIRE_"


class SettingsError(ValueError):
    """A setting is wrong; `str()` is one line that names it."""


@dataclass(frozen=True, slots=True)
class About:
    """What an option's type does not tell.

    Attributes:
        text: one line of help.
        ours: whether TGI lacks it, so that its variable starts with TOKENWIRE_.
        low: the least value, inclusive.
        high: the greatest value, inclusive.
        alias: an older name that TGI takes as well.
    """

    text: str
    ours: bool = False
    low: float = -math.inf
    high: float = math.inf
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One option as the outside sees it. `kind` is the declared type without None."""

    name: str
    kind: Any
    default: Any
    about: About

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables, in order of precedence."""
        prefix = PREFIX if self.about.ours else ""
        return tuple(prefix + name.upper() for name in self.names)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags, with dashes as TGI has them, the current one first."""
        return tuple(flag(name) for name in self.names)

    @property
    def is_list(self) -> bool:
        """Whether it may be given more than once."""
        return get_origin(self.kind) is tuple

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, and the older or shorter one that is taken as well."""
        return (self.name,) if self.about.alias is None else (self.name, self.about.alias)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values, if there is a list of them."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def read(self, raw: str, source: str) -> Any:
        """Parses a value; `source` is the flag or variable it came from.

        Raises:
            SettingsError: it cannot be parsed.
        """
        raw = raw.strip()
        if self.name == "log_level":
            raw = _python_level(raw)
        if self.choices:
            return self._read_choice(raw, source)
        try:
            return _READERS.get(self.kind, str)(raw)
        except ValueError:
            expected = _EXPECTED[self.kind]
            raise SettingsError(f"{source} must be {expected}. Given: {raw}") from None

    def check(self, value: Any) -> None:
        """Checks the bounds of a value.

        Raises:
            SettingsError: it is out of bounds.
        """
        if isinstance(value, tuple):
            for item in value:
                self.check(item)
            return
        low, high = self.about.low, self.about.high
        if not isinstance(value, int | float) or low <= value <= high:
            return
        bounds = f">= {low}" if high == math.inf else f"{low} to {high}"
        raise SettingsError(f"`{self.name}` must be {bounds}. Given: {value}")

    def _read_choice(self, raw: str, source: str) -> str:
        if raw not in self.choices:
            raise SettingsError(f"{source} must be one of {', '.join(self.choices)}. Given: {raw}")
        return raw


def spell(value: Any) -> list[str]:
    """The texts that `read` makes this value of; no text for None."""
    if value is None:
        return []
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _python_level(raw: str) -> str:
    """Turns TGI's log filters, such as `info,h2=off`, into the level of everything else."""
    plain = [part.strip().lower() for part in raw.split(",") if "=" not in part]
    level = plain[0] if plain else raw.lower()
    return {"trace": "debug", "warn": "warning", "off": "critical"}.get(level, level)


def _read_bool(raw: str) -> bool:
    lowered = raw.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError(raw)


def _read_float(raw: str) -> float:
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError(raw)
    return value


def is_ip_address(raw: str) -> bool:
    """Whether a text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(raw)
    except ValueError:
        return False
    return True


def flag(name: str) -> str:
    """The command-line flag of an option's name."""
    return "--" + name.replace("_", "-")


_READERS: dict[Any, Any] = {bool: _read_bool, int: int, float: _read_float, Path: Path}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
