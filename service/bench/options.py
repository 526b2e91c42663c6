"""The options of `tokenwire bench`, which are not a server's settings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..client.credentials import Credentials
from ..client.options import add_arguments as add_client_arguments
from ..client.options import checked, credentials_of
from ..client.target import Target
from ..launch.options import SettingsError

_LEAST_WARM_UP = 4  # seeds to choose from; see `command._warm_up`
_DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure, and where.

    Attributes:
        target: the server.
        rate: requests per second of an open loop; None for a closed one.
        concurrency: requests at a time of a closed loop; None for an open one.
        requests: number of measured requests.
        warm_up: number of requests before them that are not measured.
        input_tokens: tokens of a prompt.
        output_tokens: tokens to generate.
        shared_prefix: tokens that all prompts begin with.
        seed: seed of the arrivals, and the first sampling seed that the warm-up tries.
        credentials: what the server may ask for, and whom to believe.
        timeout: seconds after which a request has failed.
        json: whether the last line is JSON.

    Raises:
        SettingsError: two options contradict each other.
    """

    target: Target
    rate: float | None
    concurrency: int | None
    requests: int
    warm_up: int
    input_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int
    credentials: Credentials
    timeout: float
    json: bool

    def __post_init__(self) -> None:
        if self.shared_prefix >= self.input_tokens:
            raise SettingsError(
                "--shared-prefix must be < --input-tokens. "
                f"Given: {self.shared_prefix} and {self.input_tokens}"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option as a flag."""
    add_client_arguments(parser)
    _add_load_arguments(parser)
    _add_prompt_arguments(parser)
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="S",
        help=_default("decides the arrivals"),
    )
    parser.add_argument(
        "--timeout",
        type=number(above=0),
        default=300.0,
        metavar="S",
        help=_default("seconds after which a request has failed"),
    )
    parser.add_argument(
        "--json", action="store_true", help="end with the result as one line of JSON"
    )


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how many requests are sent, and when."""
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--rate",
        type=number(above=0),
        metavar="R",
        help="open loop: requests per second on average, whether or not answers come; their "
        "latencies count from when they were due",
    )
    loop.add_argument(
        "--concurrency",
        type=whole_number(1),
        metavar="N",
        help=f"closed loop: requests at a time (default: {_DEFAULT_CONCURRENCY})",
    )
    parser.add_argument(
        "--requests",
        type=whole_number(1),
        default=64,
        metavar="N",
        help=_default("requests to count"),
    )
    parser.add_argument(
        "--warm-up",
        type=whole_number(0),
        metavar="N",
        help=f"requests before, not counted (default: --concurrency, at least {_LEAST_WARM_UP})",
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of prompts and answers."""
    parser.add_argument(
        "--input-tokens",
        type=whole_number(1),
        default=128,
        metavar="N",
        help=_default("prompt tokens"),
    )
    parser.add_argument(
        "--output-tokens",
        type=whole_number(1),
        default=64,
        metavar="N",
        help=_default("new tokens"),
    )
    parser.add_argument(
        "--shared-prefix",
        type=whole_number(0),
        default=0,
        metavar="N",
        help=_default("tokens that all prompts begin with; otherwise no two begin alike"),
    )


def from_arguments(arguments: dict[str, Any]) -> BenchOptions:
    """Returns the options that were parsed.

    Raises:
        SettingsError: two of them contradict each other.
    """
    credentials = credentials_of(arguments)
    given = arguments | {"credentials": credentials}
    values = {item.name: given[item.name] for item in fields(BenchOptions)}
    if values["rate"] is None and values["concurrency"] is None:
        values["concurrency"] = _DEFAULT_CONCURRENCY
    if values["warm_up"] is None:
        values["warm_up"] = max(_LEAST_WARM_UP, values["concurrency"] or 0)
    return BenchOptions(**values)


def _default(text: str) -> str:
    return f"{text} (default: %(default)s)"


def whole_number(least: int) -> Callable[[str], Any]:
    """A parser of whole numbers, for argparse."""

    def read(raw: str) -> int:
        if not raw.isascii() or not raw.isdigit() or int(raw) < least:
            raise ValueError(f"must be a whole number >= {least}. Given: {raw}")
        return int(raw)

    return checked(read)


def number(above: float) -> Callable[[str], Any]:
    """A parser of numbers, for argparse."""

    def read(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if not above < value < math.inf:
            raise ValueError(f"must be a number > {above}. Given: {raw}")
        return value

    return checked(read)
