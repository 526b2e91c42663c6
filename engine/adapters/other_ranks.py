"""What the other ranks of a divided model are told about adapters, of which each has its part."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..protocol.adapters import LoadAdapter


class OtherRanks(Protocol):
    """The ranks besides the first.

    An adapter is read, which takes long, and then put into place between two steps. All but `read`
    is for the thread that runs steps.
    """

    def read(self, wanted: LoadAdapter, directory: Path, digest: str) -> None:
        """Has every rank read its part of an adapter, while steps go on.

        Args:
            wanted: the adapter.
            directory: below which it is.
            digest: that of the files, as this rank has found them.

        Raises:
            AdapterError: a rank cannot take it.
        """

    def discard(self, name: str) -> None:
        """Forgets what was read last under a name, where it is not to be used."""

    def adopt(self, name: str, digest: str) -> None:
        """Keeps what was read last under a name, and allocates what it takes on the devices.

        Raises:
            MemoryError: a rank has not enough; those that have keep it until `drop`.
        """

    def put(self, slot: int, digest: str | None) -> None:
        """Fills a slot; None empties it."""

    def drop(self, digest: str) -> None:
        """Forgets an adapter that was kept."""


class NoOtherRanks:
    """Of a model that one process computes."""

    def read(self, wanted: LoadAdapter, directory: Path, digest: str) -> None:
        """See OtherRanks."""

    def discard(self, name: str) -> None:
        """See OtherRanks."""

    def adopt(self, name: str, digest: str) -> None:
        """See OtherRanks."""

    def put(self, slot: int, digest: str | None) -> None:
        """See OtherRanks."""

    def drop(self, digest: str) -> None:
        """See OtherRanks."""
