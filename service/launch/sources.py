"""Where settings come from: flags, the environment and a file. The first of these wins.

Options that TGI has keep TGI's names, as flags and as variables; our own variables start with
TOKENWIRE_. An empty variable counts as absent, an unknown one of ours is an error.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from .config_file import read_config
from .envoy_admin import VARIABLE as ADMIN_VARIABLE
from .groups import grouped
from .kept import VARIABLE as KEPT_VARIABLE
from .options import PREFIX, Option, SettingsError, flag, is_ip_address, spell
from .place import VARIABLE as PLACE_VARIABLE
from .settings import OPTIONS, Settings
from .unsupported import UNSUPPORTED, Refuse

CONFIG = "config"  # the flag and the variable that name the file
_OF_SUPERVISORS = frozenset({PLACE_VARIABLE, ADMIN_VARIABLE, KEPT_VARIABLE})  # which set them
_CONFIG_VARIABLE = PREFIX + "CONFIG"

# The file's path, and texts by the names of options.
_Config = tuple[str, Mapping[str, Sequence[str]]]


def add_arguments(parser: argparse.ArgumentParser, shown: Collection[str] | None = None) -> None:
    """Adds every option as a flag; none has a default, so that variables count without flags.

    Args:
        parser: of a command.
        shown: names of the options that its help has; None for all. The others are taken as well,
            so that the same flags, or the same file, serve all commands.
    """
    parser.add_argument(
        flag(CONFIG),
        metavar="FILE",
        help="TOML with settings, by the names of the flags; flags and variables win over it "
        f"(env: {_CONFIG_VARIABLE})",
    )
    for title, options in grouped():
        group = parser.add_argument_group(title)
        for option in options:
            is_shown = shown is None or option.name in shown
            text = _help(option) if is_shown else argparse.SUPPRESS
            group.add_argument(*option.flags, **_keywords(option), help=text)
    for name in UNSUPPORTED:
        parser.add_argument(
            flag(name), dest=name, nargs="?", const="true", action=Refuse, help=argparse.SUPPRESS
        )


def _keywords(option: Option) -> dict[str, Any]:
    keywords: dict[str, Any] = {"dest": option.name}
    if option.kind is bool:
        keywords |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif option.choices:
        keywords["metavar"] = "|".join(option.choices)
    else:
        keywords["metavar"] = _METAVARS.get(option.kind, "TEXT")
    if option.is_list:
        keywords["action"] = "append"
    return keywords


def load(
    arguments: Mapping[str, str | Sequence[str] | None], environment: Mapping[str, str]
) -> Settings:
    """Returns the settings that the flags (by option name), the environment and a file give.

    Raises:
        SettingsError: a value is wrong, or a TOKENWIRE_ variable or a key of the file is unknown.
    """
    _reject_unknown(environment)
    config = _config(arguments, environment)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if (given := _given(option, arguments, environment, config)) is not None:
            values[option.name] = _read(option, *given)
    return Settings(**values)


def wants_json(
    arguments: Mapping[str, str | Sequence[str] | None], environment: Mapping[str, str]
) -> bool:
    """Whether only JSON is to be written: known before all other settings, which may be wrong."""
    (option,) = (option for option in OPTIONS if option.name == "json_output")
    try:
        given = _given(option, arguments, environment, _config(arguments, environment))
        return given is not None and bool(_read(option, *given))
    except SettingsError:
        return False  # which is reported when all are read


def _config(
    arguments: Mapping[str, str | Sequence[str] | None], environment: Mapping[str, str]
) -> _Config:
    path = arguments.get(CONFIG) or environment.get(_CONFIG_VARIABLE, "").strip()
    return (str(path), read_config(Path(str(path)))) if path else ("", {})


def _given(
    option: Option,
    arguments: Mapping[str, str | Sequence[str] | None],
    environment: Mapping[str, str],
    config: _Config,
) -> tuple[str | Sequence[str], str] | None:
    """What an option is set to, and by what."""
    if (given := arguments.get(option.name)) is not None:
        return given, option.flags[0]
    if (variable := _variable(option, environment)) is not None:
        return environment[variable], variable
    path, texts = config
    if option.name not in texts:
        return None
    values = texts[option.name]
    return values if option.is_list else values[0], f"{path}: {option.name}"


def _variable(option: Option, environment: Mapping[str, str]) -> str | None:
    """The variable that sets an option, if there is one."""
    for name in option.variables:
        raw = environment.get(name, "")
        if raw.strip() and not _is_foreign(name, raw):
            return name
    return None


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a child that gets its settings as flags."""
    known = {variable for option in OPTIONS for variable in option.variables} | {_CONFIG_VARIABLE}
    known |= {name.upper() for name, entry in UNSUPPORTED.items() if entry.warns}
    known |= _OF_SUPERVISORS
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
    known = {variable for option in OPTIONS for variable in option.variables} | {_CONFIG_VARIABLE}
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name in known or _is_foreign(name, value):
            continue
        if name in _OF_SUPERVISORS:
            continue
        without_prefix = name.removeprefix(PREFIX)
        if without_prefix in known:  # one of TGI's, which have no prefix
            raise SettingsError(f"unknown variable {name}; did you mean {without_prefix}?")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"unknown variable {name}{hint}")


_METAVARS = {int: "N", float: "X", Path: "PATH", tuple[int, ...]: "N"}

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
