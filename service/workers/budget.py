"""How many bytes may be worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import overloaded


class ByteBudget:
    """A number of bytes that requests hold while they are worked on or wait for it.

    It is used from one event loop only, so it needs no lock.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self.num_held = 0

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Holds bytes to the end of a block. One request alone may have any size.

        Raises:
            ServiceError: overloaded: there are not so many left.
        """
        with self.growing() as take:
            take(num_bytes)
            yield

    @contextmanager
    def growing(self) -> Iterator[Callable[[int], None]]:
        """Holds to the end of a block what is taken in it, by and by; yields what takes bytes.

        That raises the same error as `hold`. A request alone may take more than there are.
        """
        num_taken = 0

        def take(num_bytes: int) -> None:
            nonlocal num_taken
            if self.num_held > num_taken and self.num_held + num_bytes > self._max:
                raise overloaded()
            self.num_held += num_bytes
            num_taken += num_bytes

        try:
            yield take
        finally:
            self.num_held -= num_taken
