"""JSON as it is defined, and not as it is often meant: typed, with the first fault named.

A good body is read twice and fast: by msgspec, which knows types, and by the standard library,
which can tell duplicate names. Of a large one the long texts are read apart. Only a bad one is read
again to find its first fault: what is no JSON is said before what is no request. A large one is
read again without its long texts, unless it is no JSON: what is wrong then has a place in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import msgspec

from ..errors import ErrorKind, ServiceError
from ..workers.courtesy import give_way
from .texts_apart import cut, restored, with_texts

MAX_DEPTH = 128  # of objects and lists; serde_json, which TGI uses, has the same

_LARGE_BYTES = 128 * 1024  # each of the calls that read a smaller body takes half a millisecond

_T = TypeVar("_T")
_NAMES = {
    "str": "a string",
    "int": "an integer",
    "key": "an integer as a name",
    "float": "a number",
    "bool": "a boolean",
    "array": "a list",
    "list": "a list",
    "object": "an object",
    "dict": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"Expected `([^`]+)`(?:, got `(\w+)`)?( [<>=]+ [-+.e\d]+)?")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_UNKNOWN = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_TOO_LARGE = "number out of range"
_PATH = " - at `$"
_KEY_PATH = " - at `key` in `$"  # of an object whose members' names are numbers
_CUT = "Input data was truncated"
_KEY, _KEY_WORDS = re.compile(r"^expected '\"'"), "object keys must be strings"
_SURROGATE = re.compile(r".*(?:surrogate|hex escape).*( \(byte \d+\))")
# msgspec looks for the second half of a surrogate pair in the bytes that follow, and says that the
# text was cut where there are fewer than an escape has.
_PADDING = b" " * 12


class Unsigned64(int):
    """An integer from 0 to 2^64 - 1: msgspec's own bounds are int64s."""

    MAX = 2**64 - 1

    @classmethod
    def of(cls, value: Any) -> Unsigned64:
        """The integer that a JSON value is.

        Raises:
            ValueError: it is none, in the words of msgspec, which adds the path.
        """
        if type(value) is not int:
            raise ValueError(f"Expected `int`, got `{type(value).__name__}`")
        if value < 0:
            raise ValueError("Expected `int` >= 0")
        if value > cls.MAX:
            raise ValueError(f"Expected `int` <= {cls.MAX}")
        return cls(value)


class _FaultError(Exception):
    """A text that is JSON is nested too deep, has a name twice or too large a number."""


class _Members(list[tuple[str, Any]]):
    """The members of an object, of which two may have the same name."""


_MAY_BE_AT_FAULT = (list, float)  # `_Members` are lists


def parse(data: bytes, kind: type[_T]) -> _T:
    """The value of a JSON text.

    Args:
        data: UTF-8.
        kind: what it must be, as msgspec understands types, and `Unsigned64`.

    Raises:
        ServiceError: kind `JSON` if it is no JSON, is nested more than `MAX_DEPTH` deep, has two
            members of the same name or a number that no float64 can hold; only then kind `SHAPE`
            if it is something else than `kind`: the first fault in the text.
    """
    rest, texts = data, dict[str, str]()
    if len(data) > _LARGE_BYTES:
        with suppress(ValueError):  # of a text that is none: all of the body says where
            rest, texts = cut(data)
    try:
        return restored(_read(rest, kind), texts)
    except (ValueError, RecursionError, _FaultError) as error:
        _check_json(rest if _can_be_read(rest) else data)
        _raise_shape(*_reason_and_path(with_texts(str(error), texts)))


def _read(data: bytes, kind: type[_T]) -> _T:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or something else than `kind`.
        _FaultError: it is nested too deep, has a name twice or too large a number.
        RecursionError: it is nested far too deep.
    """
    value = msgspec.json.decode(data, type=kind, dec_hook=_unsigned64)
    give_way()
    _check_content(data.decode())
    return value


def _unsigned64(kind: type[Any], value: Any) -> Unsigned64:
    if kind is not Unsigned64:
        raise NotImplementedError(kind)
    return Unsigned64.of(value)


def _check_json(data: bytes) -> None:
    """Checks all but types.

    Raises:
        ServiceError: it is no JSON. A text that cannot be read is said before one that may not be
            so deep, have a name twice or so large a number.
    """
    try:
        _check_syntax(data)
        text = data.decode()
        _check_content(text)
    except RecursionError:
        raise too_deep() from None
    except _FaultError:
        raise _first_fault(text) from None


def _check_syntax(data: bytes) -> None:
    end = _first_bad_byte(data)
    try:
        _skip(data[:end])
    except msgspec.DecodeError as error:
        if str(error) != _CUT or end == len(data):
            raise _malformed(str(error)) from error
    if end < len(data):
        raise _malformed(f"invalid UTF-8 (byte {end})")


def _can_be_read(data: bytes) -> bool:
    """Whether a text is JSON but for what `_check_content` looks for."""
    try:
        _check_syntax(data)
    except (ServiceError, RecursionError):
        return False
    return True


def _skip(data: bytes) -> None:
    """Reads a text of which nothing is kept.

    Raises:
        msgspec.DecodeError: it is no JSON.
    """
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        if str(error) == _CUT:
            _check_last_surrogate(data)
        raise


def _check_last_surrogate(data: bytes) -> None:
    try:
        msgspec.json.decode(data + _PADDING, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        if _SURROGATE.fullmatch(str(error)):
            raise


def _check_content(text: str) -> None:
    """Checks depth, names and numbers.

    Raises:
        _FaultError: one of them is at fault.
        RecursionError: it is very deep.
    """
    tree = _UNIQUE_NAMES.decode(text)
    # Brackets in texts count here as well: they cost a walk through the tree, and nothing else.
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(tree) > MAX_DEPTH:
        raise _FaultError


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its members.

    Raises:
        _FaultError: two have the same name.
    """
    give_way()
    result = dict(members)
    if len(result) < len(members):
        raise _FaultError
    return result


def _finite(digits: str) -> float:
    """A number, also in a field that is ignored.

    Raises:
        _FaultError: no float64 can hold it.
    """
    number = float(digits)
    if math.isinf(number):
        raise _FaultError
    return number


# Integers are not looked at: msgspec has read those that matter, however long they are.
_UNIQUE_NAMES = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=len)
_ALL_MEMBERS = json.JSONDecoder(object_pairs_hook=_Members, parse_int=len)


def _first_fault(text: str) -> ServiceError:
    """The first of those that `_check_content` looks for."""
    return next(_faults(_ALL_MEMBERS.decode(text), "", 1))


def _faults(value: list[Any] | float, path: str, depth: int) -> Iterator[ServiceError]:
    if isinstance(value, list) and depth > MAX_DEPTH:
        yield too_deep()
    elif isinstance(value, _Members):
        seen: set[str] = set()
        for name, member in value:
            if name in seen:
                text = _at(path, f"duplicate field `{name}`")
                yield ServiceError(ErrorKind.SHAPE, text, field=_member(path, name))
            seen.add(name)
            if isinstance(member, _MAY_BE_AT_FAULT):
                yield from _faults(member, _member(path, name), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, _MAY_BE_AT_FAULT):
                yield from _faults(item, f"{path}[{index}]", depth + 1)
    elif math.isinf(value):
        yield _malformed(_at(path, _TOO_LARGE))


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
    """What msgspec says, and where."""
    if _KEY_PATH in text:
        text = text.replace(_KEY_PATH, _PATH).replace("`int`", "`key`", 1)
    reason, _, path = text.partition(_PATH)
    return reason, path.rstrip("`").removeprefix(".")


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
    elif reason == "Expected `array` of length >= 1":
        reason = f"Empty array detected. Do not use an empty array for the {path}."
    elif unknown := _UNKNOWN.fullmatch(reason):
        reason = f"unknown variant `{unknown[1]}`"
    elif reason in ("Integer value out of range", "Number out of range"):  # thousands of digits
        reason = _TOO_LARGE
    raise ServiceError(ErrorKind.SHAPE, _at(path, reason), field=field or None)


def _member(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(path: str, reason: str) -> str:
    return f"{path}: {reason}" if path else reason


def _first_bad_byte(data: bytes) -> int:
    """Where a text stops being UTF-8."""
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
    reason = reason.removeprefix("JSON is malformed: ")
    reason = _SURROGATE.sub(r"half a surrogate pair\1", _KEY.sub(_KEY_WORDS, reason))
    return ServiceError(ErrorKind.JSON, reason)


def too_deep() -> ServiceError:
    """The error of a text with too many lists and objects in each other."""
    return ServiceError(ErrorKind.JSON, f"it is nested more than {MAX_DEPTH} deep")
