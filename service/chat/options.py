"""The options of `tokenwire chat`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..client.credentials import Credentials
from ..client.options import add_arguments as add_client_arguments
from ..client.options import checked, credentials_of
from ..client.target import Target
from .parameters import read_parameter
from .tools import Tool, read_tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Whom to talk to, and how.

    Attributes:
        target: the server.
        credentials: what the server may ask for, and whom to believe.
        system: what the model is told first.
        parameters: of every request, by name.
        tools: what the model may call.
    """

    target: Target
    credentials: Credentials
    system: str
    parameters: dict[str, Any]
    tools: list[Tool]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option as a flag."""
    add_client_arguments(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--param",
        dest="parameters",
        type=checked(read_parameter),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of answers, like temperature=0.7 or max_tokens=500; repeatable",
    )
    parser.add_argument(
        "--tools",
        type=checked(read_tools),
        default=[],
        metavar="FILE",
        help="JSON list of tools in OpenAI's form; the model calls them, you type the results",
    )


def from_arguments(arguments: dict[str, Any]) -> ChatOptions:
    """Returns the options that were parsed.

    Raises:
        SettingsError: two of them contradict each other.
    """
    given = {name: value for name, value in arguments["parameters"] if value is not None}
    return ChatOptions(
        target=arguments["target"],
        credentials=credentials_of(arguments),
        system=arguments["system"],
        parameters=given,
        tools=arguments["tools"],
    )
