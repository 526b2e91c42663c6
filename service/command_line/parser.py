"""A parser of arguments whose errors are one line, with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """See argparse.ArgumentParser."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of a program with commands, or ends the process with one line."""
    commands = commands_of(parser)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        advice = hint(argv[0], commands) or f"; see {parser.prog} --help"
        parser.error(f"unknown command {argv[0]}{advice}")
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        command = commands[arguments.command]
        command.error(_unknown(rest[0], flags_of(command)))
    return arguments


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a parser, without those that help does not know."""
    return [
        name
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        for name in action.option_strings
        if name.startswith("--")
    ]


def hint(name: str, known: Iterable[str]) -> str:
    """What a wrong name was probably meant to be, as the end of an error; empty without an idea."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(argument: str, flags: Iterable[str]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument}"
    name = argument.partition("=")[0]
    return f"unknown flag {name}{hint(name, flags)}"
