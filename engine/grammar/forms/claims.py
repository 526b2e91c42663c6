"""What a keyword claims of a value of one type: the forms of values that fit, and of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ...protocol.errors import GrammarError
from ..schema.keywords import Schema
from .limits import unsayable

KINDS = ("null", "boolean", "number", "string", "array", "object")


class Form(Protocol):
    """Values of one type that are all of this."""

    def met(self, other: Self) -> Self | None:
        """What is of both forms; None if nothing is."""


Forms = list[Any]  # of values of the same type, each a `Form`


@dataclass(frozen=True, slots=True)
class Claim:
    """The forms of values that fit a keyword, and of values that do not."""

    holds: Callable[[], Forms]
    fails: Callable[[], Forms]


def claim(holds: Form, fails: Iterable[Form] = ()) -> Claim:
    """The claim of one form."""
    others = list(fails)
    return Claim(lambda: [holds], lambda: others)


def one_sided(holds: Form, key: str) -> Claim:
    """A claim whose opposite cannot be said."""

    def fail() -> Forms:
        raise unsayable(f'the opposite of "{key}"')

    return Claim(lambda: [holds], fail)


@dataclass(frozen=True, slots=True)
class ValuesForm:
    """Values of a type that has few."""

    values: frozenset[bool | None]

    def met(self, other: ValuesForm) -> ValuesForm | None:
        """What is of both forms; None if nothing is."""
        both = self.values & other.values
        return ValuesForm(both) if both else None


def kind_of(value: Any) -> str:
    """The type of a JSON value; an integer is a number."""
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return "null" if value is None else kinds.get(type(value), "object")


def size(schema: Schema, key: str, default: int | None = None) -> int | None:
    """A size that a schema gives.

    Raises:
        GrammarError: it is none.
    """
    value = schema.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (type(value) is not int or value < 0):
        raise GrammarError(f'"{key}" must be a natural number')
    return value


def named(schema: Schema, key: str) -> Schema:
    """A keyword's schemas by name.

    Raises:
        GrammarError: it has none.
    """
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise GrammarError(f'"{key}" must be an object')
    return value


def listed(schema: Schema, key: str) -> list[Any]:
    """A keyword's list.

    Raises:
        GrammarError: it has none.
    """
    value = schema.get(key, [])
    if not isinstance(value, list):
        raise GrammarError(f'"{key}" must be a list')
    return value
