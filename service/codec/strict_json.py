"""JSON as it is defined, and not as it is often meant: typed, with the first fault named.

msgspec reads the bytes in one pass and stops at the first thing that is wrong, be it JSON or a
type. What it accepts all the same, duplicate names and any depth, is checked afterwards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import msgspec

from ..errors import ErrorKind, ServiceError

MAX_DEPTH = 128  # of objects and lists; serde_json, which TGI uses, has the same

_T = TypeVar("_T")
_NAMES = {
    "str": "a string",
    "int": "an integer",
    "key": "an integer as a name",
    "float": "a number",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"Expected `([^`]+)`(?:, got `(\w+)`)?( [<>=]+ [-+.e\d]+)?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_UNKNOWN = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_TOO_LARGE = "number out of range"
_PATH = " - at `$"
_KEY_PATH = " - at `key` in `$"  # of an object whose members' names are numbers
_ABOUT = re.compile(r"<(\w+)> ")


class _DuplicateNameError(Exception):
    """Two members of an object have the same name."""


class _Members(list[tuple[str, Any]]):
    """The members of an object, of which two may have the same name."""


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
        reason, path = _reason_and_path(str(error))
        if reason == "Number out of range":
            raise _malformed(_at(path, _TOO_LARGE)) from error
        _raise_shape(reason, path)
    except _DuplicateNameError:
        raise _duplicate(data) from None
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeDecodeError as error:
        raise _malformed(f"invalid UTF-8 (byte {_first_bad_byte(data)})") from error
    except ValueError as error:  # no JSON
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
        raise _DuplicateNameError
    return result


def _duplicate(data: bytes) -> ServiceError:
    """The error for the first two members of the same name, which a second reading looks for."""
    try:
        path, name = next(_duplicates(_ALL_MEMBERS.decode(data.decode()), ""))
    except (RecursionError, StopIteration):  # they are deeper than anything may be
        return _too_deep()
    text = _at(path, f"duplicate field `{name}`")
    return ServiceError(ErrorKind.SHAPE, text, field=_member(path, name))


def _duplicates(value: Any, path: str, depth: int = 1) -> Iterator[tuple[str, str]]:
    """The path of each object with two members of the same name, and that name."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, _Members):
        seen: set[str] = set()
        for name, member in value:
            if name in seen:
                yield path, name
            seen.add(name)
            yield from _duplicates(member, _member(path, name), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _duplicates(item, f"{path}[{index}]", depth + 1)


def _finite(digits: str) -> float:
    """A number, also in a field that is ignored.

    Raises:
        ValueError: no float64 can hold it.
    """
    number = float(digits)
    if math.isinf(number):
        raise ValueError(_TOO_LARGE)
    return number


# Integers are not looked at: msgspec has read those that matter, however long they are.
_UNIQUE_NAMES = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=len)
_ALL_MEMBERS = json.JSONDecoder(object_pairs_hook=_Members, parse_int=len)


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


def _reason_and_path(text: str) -> tuple[str, str]:
    """What msgspec says, and where.

    A reason that starts with a member's name in brackets, like `<seed>`, is about that member:
    only so can the check of a whole object name it.
    """
    if _KEY_PATH in text:
        text = text.replace(_KEY_PATH, _PATH).replace("`int`", "`key`", 1)
    reason, _, path = text.partition(_PATH)
    path = path.rstrip("`").removeprefix(".")
    if about := _ABOUT.match(reason):
        return reason[about.end() :], _member(path, about[1])
    return reason, path


def _raise_shape(reason: str, path: str) -> NoReturn:
    """Says in the words of JSON's users what msgspec says in Python's.

    Raises:
        ServiceError: always.
    """
    field = path
    if missing := _MISSING.fullmatch(reason):
        field = _member(path, missing[1])
        reason = f"missing field `{missing[1]}`"
    elif expected := _EXPECTED.fullmatch(reason):
        reason = _in_words(expected)
    elif unknown := _UNKNOWN.fullmatch(reason):
        reason = f"unknown variant `{unknown[1]}`"
    elif reason == "Integer value out of range":  # thousands of digits
        reason = _TOO_LARGE
    raise ServiceError(ErrorKind.SHAPE, _at(path, reason), field=field or None)


def _member(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(path: str, reason: str) -> str:
    return f"{path}: {reason}" if path else reason


def _first_bad_byte(data: bytes) -> int:
    """Where a text stops being UTF-8: msgspec counts from the start of a value."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def _in_words(expected: re.Match[str]) -> str:
    kinds, got, bound = expected.groups(default="")
    wanted = " or ".join(_NAMES.get(kind, kind) for kind in kinds.split(" | ") if kind != "null")
    text = f"expected {wanted}{bound}"
    return f"{text}, got {_NAMES.get(got, got)}" if got else text


def _malformed(reason: str) -> ServiceError:
    return ServiceError(ErrorKind.JSON, reason.removeprefix("JSON is malformed: "))


def _too_deep() -> ServiceError:
    return ServiceError(ErrorKind.JSON, f"it is nested more than {MAX_DEPTH} deep")
