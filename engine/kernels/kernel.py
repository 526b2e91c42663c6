"""Functions of the compiled library, and programs: recorded calls that run as one.

A call from Python takes longer than many kernels: arguments are checked and converted one by one. A
listener that records the calls of a step can make a `Program` of them, which is a single call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FIELDS: dict[type[Any], str] = {POINTER: "p", SIZE: "i", INT: "i", FLOAT: "f"}
_MAX_ARGUMENTS = 26  # as in c/replay.h
_NO_MEMORY = -1  # which all functions of c/ return then

Types = tuple[type[Any], ...]


class Call(NamedTuple):
    """A call of a kernel; pointers among its arguments are addresses."""

    kernel: Kernel
    arguments: tuple[Any, ...]


_listener: ContextVar[Callable[[Call], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Call], None]) -> Iterator[None]:
    """Reports every kernel call of this thread to a listener while the context is active."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Kernel:
    """A function of the library that returns a status.

    Args:
        library: made by `build.py`.
        name: of the function, without its prefix `tw_`.
        types: of its arguments.
    """

    __slots__ = ("_function", "name", "replay", "types")

    def __init__(self, library: ctypes.CDLL, name: str, types: Types) -> None:
        self.name = name
        self.types = types
        self.replay = ctypes.cast(library[f"tw_replay_{name}"], POINTER).value
        self._function = library[f"tw_{name}"]
        self._function.restype, self._function.argtypes = INT, types

    def __call__(self, *arguments: Any) -> None:
        """Calls it, without the GIL.

        Raises:
            MemoryError: it could not allocate scratch memory.
            IndexError: an index is out of range.
        """
        if (listener := _listener.get()) is not None:
            listener(Call(self, arguments))
        _check(self._function(*arguments), self.name)


class _Argument(ctypes.Union):
    _fields_ = (("i", ctypes.c_int64), ("p", POINTER), ("f", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("replay", POINTER), ("arguments", _Argument * _MAX_ARGUMENTS))


class Program:
    """Calls that run as one; the memory that they point to must stay allocated.

    Args:
        library: made by `build.py`.
        calls: in order.
    """

    def __init__(self, library: ctypes.CDLL, calls: Iterable[Call]) -> None:
        converted = [_converted(call) for call in calls]
        self._calls = (_Call * len(converted))(*converted)
        self._replay = library.tw_replay

    def run(self) -> None:
        """Makes the calls.

        Raises:
            MemoryError: a call raised it; the calls after it were not made.
            IndexError: likewise.
        """
        _check(self._replay(self._calls, len(self._calls)), "a program")


def _check(status: int, name: str) -> None:
    if status == _NO_MEMORY:
        raise MemoryError(f"{name} is out of memory")
    if status:
        raise IndexError(f"{name} was given an index out of range")


def _converted(call: Call) -> _Call:
    arguments = [
        _Argument(**{_FIELDS[kind]: value})
        for kind, value in zip(call.kernel.types, call.arguments, strict=True)
    ]
    return _Call(call.kernel.replay, (_Argument * _MAX_ARGUMENTS)(*arguments))
