"""Long lists of small objects that are made when they are read, and not kept.

Made at once, the hundred thousand tokens of a long text would hold up the event loop; kept, the
garbage collector would visit them again and again. Who reads many of them beside the event loop
gives way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from ..workers.courtesy import give_way, giving_way

_T = TypeVar("_T")
_NUM_FREED = 256  # at a time: with likeliest tokens a fifth of a millisecond


class Lazy(Sequence[_T], Generic[_T]):
    """Items in place of values, one for each.

    Args:
        make: makes an item of a value; always an equal one.
        values: of which they are made.
    """

    __slots__ = ("_make", "_values")

    def __init__(self, make: Callable[[Any], _T], values: Sequence[Any]) -> None:
        self._make = make
        self._values = values

    def release(self) -> None:
        """Frees the values, bit by bit, where nothing reads them any more.

        All those of a long text at once would hold up the event loop for milliseconds.
        """
        if isinstance(self._values, list):
            while self._values:
                give_way()
                del self._values[-_NUM_FREED:]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[_T]:
        return map(self._make, giving_way(self._values))

    @overload
    def __getitem__(self, index: int) -> _T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return Lazy(self._make, self._values[index])
        return self._make(self._values[index])
