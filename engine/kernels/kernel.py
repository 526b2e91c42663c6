"""Functions of the compiled library, and lists of calls of them.

A call from Python takes longer than many a kernel: arguments are checked and converted one by one.
Who listens to the calls of a step can make a `Program` of them, which is one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FIELDS: dict[type[Any], str] = {POINTER: "p", SIZE: "i", INT: "i", FLOAT: "f"}
_MAX_ARGUMENTS = 24  # as in cpu.c, and so is the next
_NO_MEMORY = -1

Types = tuple[type[Any], ...]


class Call(NamedTuple):
    """A call that was made; pointers among its arguments are addresses."""

    kernel: Kernel
    arguments: tuple[Any, ...]


_listener: ContextVar[Callable[[Call], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Call], None]) -> Iterator[None]:
    """Tells the listener of every kernel that this thread calls meanwhile."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Kernel:
    """A function of the library that says whether it succeeded.

    Args:
        library: made by `build.py`.
        name: that of the function, without its prefix.
        types: of its arguments.
    """

    __slots__ = ("_function", "name", "player", "types")

    def __init__(self, library: ctypes.CDLL, name: str, types: Types) -> None:
        self.name = name
        self.types = types
        self.player = ctypes.cast(library[f"tw_play_{name}"], POINTER).value
        self._function = library[f"tw_{name}"]
        self._function.restype, self._function.argtypes = INT, types

    def __call__(self, *arguments: Any) -> None:
        """Calls it, without the GIL.

        Raises:
            MemoryError: there was none for its scratch.
            IndexError: it was told to take what is not there.
        """
        if (listener := _listener.get()) is not None:
            listener(Call(self, arguments))
        _check(self._function(*arguments), self.name)


class _Argument(ctypes.Union):
    _fields_ = (("i", ctypes.c_int64), ("p", POINTER), ("f", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("player", POINTER), ("arguments", _Argument * _MAX_ARGUMENTS))


class Program:
    """Calls that are made together; what they point to must stay where it is.

    Args:
        library: made by `build.py`.
        calls: in order.
    """

    def __init__(self, library: ctypes.CDLL, calls: Iterable[Call]) -> None:
        converted = [_converted(call) for call in calls]
        self._calls = (_Call * len(converted))(*converted)
        self._play = library.tw_play

    def run(self) -> None:
        """Makes the calls.

        Raises:
            MemoryError: as one of them, and those behind it were not made.
            IndexError: likewise.
        """
        _check(self._play(self._calls, len(self._calls)), "a program")


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
    return _Call(call.kernel.player, (_Argument * _MAX_ARGUMENTS)(*arguments))
