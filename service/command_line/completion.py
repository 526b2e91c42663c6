"""Scripts that complete a program's commands and flags in bash, zsh and fish.

They are made of the parser itself, so that they have what it takes. A value that is one of a list
is completed from the list, every other one as a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from .parser import commands_of


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as shells know it.

    Attributes:
        names: its spellings.
        help: what it is for, in one line.
        takes_value: whether the next word is its value.
        choices: what the value may be, if there is a list.
    """

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A command with its flags, and what its plain argument may be, if there is a list."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    arguments: tuple[str, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`: one of SHELLS."""
    return SHELLS[shell](parser.prog, list(_commands(parser)))


def _commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    for name, command in commands_of(parser).items():
        flags = [action for action in command._actions if action.option_strings]
        plain = [action for action in command._actions if not action.option_strings]
        yield Command(
            name=name,
            help=_line(command.description),
            flags=tuple(_flag(item) for item in flags if item.help is not argparse.SUPPRESS),
            arguments=tuple(str(choice) for item in plain for choice in item.choices or ()),
        )


def _flag(action: argparse.Action) -> Flag:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    listed = tuple(metavar.split("|")) if "|" in metavar else ()
    choices = tuple(map(str, action.choices or ())) or listed
    # A value that may be left out comes with `=` only.
    takes_value = action.nargs not in (0, "?")
    return Flag(tuple(action.option_strings), _line(action.help), takes_value, choices)


def _line(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").split())


def _bash(program: str, commands: list[Command]) -> str:
    names = " ".join(item.name for item in commands)
    cases = "\n".join(
        f'    {item.name}) words="{" ".join(item.arguments or _names(item))}" ;;'
        for item in commands
    )
    values = "\n".join(
        f'    {item.name}:{name}) words="{" ".join(flag.choices)}" ;;'
        for item in commands
        for flag in item.flags
        if flag.takes_value and flag.choices
        for name in flag.names
    )
    files = "|".join(
        f"{item.name}:{name}"
        for item in commands
        for flag in item.flags
        if flag.takes_value and not flag.choices
        for name in flag.names
    )
    return f"""# bash completion of {program}
_{program}() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}:$last" in
{values}
    {files}) COMPREPLY=($(compgen -f -- "$word")); return ;;
  esac
  [ -n "$words" ] || case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _{program} {program}
"""


def _zsh(program: str, commands: list[Command]) -> str:
    names = "\n".join(f"    {_zsh_quoted(f'{item.name}:{item.help}')}" for item in commands)
    cases = "\n".join(
        f"    {item.name})\n      _arguments -s " + " ".join(_zsh_specs(item)) + "\n      ;;"
        for item in commands
    )
    return f"""#compdef {program}
_{program}() {{
  local -a commands
  commands=(
{names}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{cases}
  esac
}}
if [ "$funcstack[1]" = "_{program}" ]; then _{program} "$@"; else compdef _{program} {program}; fi
"""


def _zsh_specs(command: Command) -> Iterator[str]:
    for flag in command.flags:
        text = flag.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
        values = f"({' '.join(flag.choices)})" if flag.choices else "_files"
        value = f":value:{values}" if flag.takes_value else ""
        for name in flag.names:
            yield _zsh_quoted(f"*{name}[{text}]{value}")
    if command.arguments:
        yield _zsh_quoted(f"1:value:({' '.join(command.arguments)})")


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish(program: str, commands: list[Command]) -> str:
    lines = [f"# fish completion of {program}", f"complete -c {program} -f"]
    for item in commands:
        lines.append(
            f"complete -c {program} -n __fish_use_subcommand -a {item.name}"
            f" -d {_fish_quoted(item.help)}"
        )
        within = f"complete -c {program} -n '__fish_seen_subcommand_from {item.name}'"
        if item.arguments:
            lines.append(f"{within} -a {_fish_quoted(' '.join(item.arguments))}")
        lines.extend(f"{within} {_fish_flag(flag)}" for flag in item.flags)
    return "\n".join(lines) + "\n"


def _fish_flag(flag: Flag) -> str:
    names = " ".join(
        f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names
    )
    value = ""
    if flag.takes_value:
        choices = f" -a {_fish_quoted(' '.join(flag.choices))}"
        value = f" -x{choices}" if flag.choices else " -r -F"
    return f"{names}{value} -d {_fish_quoted(flag.help)}"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _names(command: Command) -> list[str]:
    return [name for flag in command.flags for name in flag.names]


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
