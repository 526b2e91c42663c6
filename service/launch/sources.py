"""Where settings come from: flags and the environment. A flag wins over its variable.

Options that TGI has keep TGI's names, as flags and as variables; our own variables start with
TOKENWIRE_. An empty variable counts as absent, an unknown one of ours is an error.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from .options import PREFIX, Option, SettingsError, flag, is_ip_address, spell
from .settings import OPTIONS, Settings
from .unsupported import UNSUPPORTED, Refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option as a flag; none has a default, so that variables count without flags."""
    for option in OPTIONS:
        keywords: dict[str, Any] = {"dest": option.name, "help": _help(option)}
        if option.kind is bool:
            keywords |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif option.choices:
            keywords["metavar"] = "|".join(option.choices)
        if option.is_list:
            keywords["action"] = "append"
        parser.add_argument(*option.flags, **keywords)
    for name in UNSUPPORTED:
        parser.add_argument(
            flag(name), dest=name, nargs="?", const="true", action=Refuse, help=argparse.SUPPRESS
        )


def load(
    arguments: Mapping[str, str | Sequence[str] | None], environment: Mapping[str, str]
) -> Settings:
    """Returns the settings that the flags (by option name) and the environment give.

    Raises:
        SettingsError: a value is wrong, or a TOKENWIRE_ variable is unknown.
    """
    _reject_unknown(environment)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        given = arguments.get(option.name)
        if given is not None:
            values[option.name] = _read(option, given, option.flags[0])
            continue
        for variable in option.variables:
            raw = environment.get(variable, "")
            if raw.strip() and not _is_foreign(variable, raw):
                values[option.name] = _read(option, raw, variable)
                break
    return Settings(**values)


def wants_json(
    arguments: Mapping[str, str | Sequence[str] | None], environment: Mapping[str, str]
) -> bool:
    """Whether only JSON is to be written: known before all other settings, which may be wrong."""
    (option,) = (option for option in OPTIONS if option.name == "json_output")
    given = arguments.get(option.name) or environment.get(option.variables[0], "")
    try:
        return bool(given) and bool(_read(option, given, option.flags[0]))
    except SettingsError:
        return False  # which is reported when all are read


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a child that gets its settings as flags."""
    known = {variable for option in OPTIONS for variable in option.variables}
    known |= {name.upper() for name, entry in UNSUPPORTED.items() if entry.warns}
    return {name: value for name, value in environment.items() if name not in known}


def _read(option: Option, given: str | Sequence[str], source: str) -> Any:
    if not option.is_list:
        assert isinstance(given, str)
        return option.read(given, source)
    parts = [given] if isinstance(given, str) else given
    (kind, _) = get_args(option.kind)
    each = replace(option, kind=kind)
    return tuple(
        each.read(item, source) for part in parts for item in part.split(",") if item.strip()
    )


def _help(option: Option) -> str:
    spelt = ",".join(spell(option.default))
    default = f"default: {spelt}; " if spelt else ""
    more = ", repeatable" if option.is_list else ""
    return f"{option.about.text} ({default}env: {option.variables[0]}{more})".replace("%", "%%")


def _reject_unknown(environment: Mapping[str, str]) -> None:
    known = {variable for option in OPTIONS for variable in option.variables}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name in known or _is_foreign(name, value):
            continue
        without_prefix = name.removeprefix(PREFIX)
        if without_prefix in known:  # one of TGI's, which have no prefix
            raise SettingsError(f"unknown variable {name}; did you mean {without_prefix}?")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"unknown variable {name}{hint}")


# Kubernetes describes every Service to every pod; one named `tokenwire` or `tokenwire-grpc` looks
# like settings of ours: TOKENWIRE_SERVICE_HOST=10.0.0.7, TOKENWIRE_GRPC_PORT=tcp://10.0.0.7:50051.
_SERVICE_LINK = re.compile(
    r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?$"
)


def _is_foreign(variable: str, raw: str) -> bool:
    """Whether a variable with one of our names was set by another program for its own purpose."""
    if variable == "HOSTNAME":  # shells and container runtimes put the machine's name there
        return not is_ip_address(raw.strip())
    if not variable.startswith(PREFIX):
        return False
    return raw.startswith(("tcp://", "udp://", "sctp://")) or bool(_SERVICE_LINK.search(variable))
