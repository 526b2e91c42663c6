"""JSON as it is defined, and not as it is often meant: typed, with the first fault named.

msgspec reads the bytes in one pass and stops at the first thing that is wrong, be it JSON or a
type. What it accepts all the same, duplicate names and any depth, is checked afterwards.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from ..errors import ErrorKind, ServiceError

MAX_DEPTH = 128  # of objects and lists; serde_json, which TGI uses, has the same

_T = TypeVar("_T")
_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"Expected `([^`]+)`(?:, got `(\w+)`)?( [<>=]+ -?\d+)?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_PATH = " - at `$"


class _DuplicateNameError(ValueError):
    """Two members of an object have the same name, which is the error's text."""


def parse(data: bytes, kind: type[_T]) -> _T:
    """The value of a JSON text.

    Args:
        data: UTF-8.
        kind: what it must be, as msgspec understands types.

    Raises:
        ServiceError: kind `JSON` if it is no JSON, is nested more than `MAX_DEPTH` deep or has a
            number that no float64 can hold; kind `SHAPE` if it is something else than `kind` or has
            two members of the same name.
    """
    try:
        value = msgspec.json.decode(data, type=kind)
        _check_names_and_depth(data)
    except msgspec.ValidationError as error:
        if "Number out of range" in str(error):
            raise _malformed(str(error)) from error
        _raise_shape(str(error))
    except _DuplicateNameError as error:
        raise ServiceError(
            ErrorKind.SHAPE, f"duplicate field `{error}`", field=str(error)
        ) from None
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise _malformed(str(error)) from error
    return value


def _check_names_and_depth(data: bytes) -> None:
    tree = _UNIQUE_NAMES.decode(data.decode())
    # Brackets in texts count here as well: they cost a walk through the tree, and nothing else.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _depth(tree) > MAX_DEPTH:
        raise _too_deep()


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members.

    Raises:
        _DuplicateNameError: two have the same name.
    """
    result = dict(members)
    if len(result) < len(members):
        names = [name for name, _ in members]
        raise _DuplicateNameError(next(name for name in names if names.count(name) > 1))
    return result


def _finite(digits: str) -> float:
    """A number, also in a field that is ignored.

    Raises:
        ValueError: no float64 can hold it.
    """
    number = float(digits)
    if math.isinf(number):
        raise ValueError("Number out of range")
    return number


_UNIQUE_NAMES = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)


def _depth(tree: Any) -> int:
    """How deep objects and lists are nested, counted no further than one beyond the limit."""
    depth = 0
    level = [tree]
    while level and depth <= MAX_DEPTH:
        level = [item for item in level if isinstance(item, (dict, list))]
        depth += bool(level)
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _raise_shape(text: str) -> NoReturn:
    """Says in the words of JSON's users what msgspec says in Python's.

    Raises:
        ServiceError: always.
    """
    reason, _, path = text.partition(_PATH)
    path = field = path.rstrip("`").removeprefix(".")
    if missing := _MISSING.fullmatch(reason):
        field = f"{path}.{missing[1]}" if path else missing[1]
        reason = f"missing field `{missing[1]}`"
    elif expected := _EXPECTED.fullmatch(reason):
        reason = _in_words(expected)
    text = f"{path}: {reason}" if path else reason
    raise ServiceError(ErrorKind.SHAPE, text, field=field or None)


def _in_words(expected: re.Match[str]) -> str:
    kinds, got, bound = expected.groups(default="")
    wanted = " or ".join(_NAMES.get(kind, kind) for kind in kinds.split(" | ") if kind != "null")
    text = f"expected {wanted}{bound}"
    return f"{text}, got {_NAMES.get(got, got)}" if got else text


def _malformed(reason: str) -> ServiceError:
    return ServiceError(ErrorKind.JSON, reason.removeprefix("JSON is malformed: "))


def _too_deep() -> ServiceError:
    return ServiceError(ErrorKind.JSON, f"it is nested more than {MAX_DEPTH} deep")
