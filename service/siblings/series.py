"""The series of several service processes, as any of them shows them.

Whoever is asked lets all processes write their series into files, and adds these up. A process that
dies leaves its file: whatever was shown once is never taken back. The next one in its place counts
on from there. What it had counted since it was last asked is lost, as in a server of one process.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from prometheus_client.core import Metric

from ..launch.place import Place
from ..metrics.exposition import Source
from ..metrics.families import Family, Merger, pack, read, unpack


class SharedSeries:
    """The series of this process, for the others, and those of all.

    Args:
        place: of this process.
        source: its own series.
        held: names of gauges that each process has of its own.
    """

    def __init__(self, place: Place, source: Source, held: Collection[str]) -> None:
        self._place = place
        self._source = source
        self._merger = Merger(held)
        self._lock = threading.Lock()  # of the file
        self._before = _stored(place, place.number)

    def store(self) -> list[Family]:
        """Writes the series of this process for the others, and returns them. Any thread may."""
        with self._lock:
            families = self._merger.add_counts(read(self._source.collect()), self._before)
            path = _path(self._place, self._place.number)
            fresh = path.with_suffix(".new")
            fresh.write_bytes(pack(families))
            fresh.replace(path)
        return families

    def merged(self, live: Collection[int]) -> Iterable[Metric]:
        """The series of all, given the numbers of the others that have just stored theirs."""
        own = (self._place.number, self.store())
        others = {number: _stored(self._place, number) for number in self._place.others}
        return [family.to_metric() for family in self._merger.merge(own, others, live)]


def _path(place: Place, number: int) -> Path:
    return place.directory / f"series-{number}"


def _stored(place: Place, number: int) -> list[Family]:
    """What a process has stored last; nothing if it never has."""
    try:
        return unpack(_path(place, number).read_bytes())
    except FileNotFoundError:
        return []
