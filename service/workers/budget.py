"""How many bytes may be worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator
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
        if self.num_held and self.num_held + num_bytes > self._max:
            raise overloaded()
        self.num_held += num_bytes
        try:
            yield
        finally:
            self.num_held -= num_bytes
