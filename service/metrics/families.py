"""Series as values that cross process boundaries, and several processes' series as one.

What a process counts is added up over all processes that ever were, so that no sum falls when one
dies. What a process holds is added up over those that live. What all processes know alike is shown
once, as the one that is asked knows it. What is about a process itself is shown for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgpack
from prometheus_client.core import Exemplar, Metric

_WORKER = "worker"  # the label of what is about one process
_OF_PROCESS = ("process_", "python_")  # what their names begin with
_COUNTS = ("counter", "histogram")

# The name of a series, with its labels.
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Rule(Enum):
    """How the series of several processes become one."""

    COUNTED = 1
    HELD = 2
    KNOWN = 3
    EACH = 4


@dataclass(frozen=True, slots=True)
class Point:
    """A value, and the last request that it was observed of, if one is named."""

    value: float
    exemplar: Exemplar | None = None

    def __add__(self, other: Point) -> Point:
        """The sum, with the later exemplar."""
        named = [point for point in (self, other) if point.exemplar is not None]
        last = max(named, key=_named_at).exemplar if named else None
        return Point(self.value + other.value, last)


@dataclass(slots=True)
class Family:
    """The series of one name, by their labels."""

    name: str
    text: str
    kind: str
    points: dict[_Key, Point] = field(default_factory=dict)

    def add(self, other: Family) -> None:
        """Adds the values of another process."""
        for key, point in other.points.items():
            self.points[key] = self.points[key] + point if key in self.points else point

    def labelled(self, worker: int) -> Family:
        """The same with the number of its process."""
        points = {
            (name, (*labels, (_WORKER, str(worker)))): point
            for (name, labels), point in self.points.items()
        }
        return Family(self.name, self.text, self.kind, points)

    def to_metric(self) -> Metric:
        """What the library shows."""
        metric = Metric(self.name, self.text, self.kind)
        for (name, labels), point in self.points.items():
            metric.add_sample(name, dict(labels), point.value, exemplar=point.exemplar)
        return metric


def read(metrics: Iterable[Metric]) -> list[Family]:
    """The families that a registry has."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            {
                (sample.name, tuple(sample.labels.items())): Point(sample.value, sample.exemplar)
                for sample in metric.samples
            },
        )
        for metric in metrics
    ]


def pack(families: Iterable[Family]) -> bytes:
    """Families as bytes."""
    packed: bytes = msgpack.packb([_packed_family(family) for family in families])
    return packed


def unpack(raw: bytes) -> list[Family]:
    """What `pack` has packed."""
    return [
        Family(name, text, kind, dict(map(_unpacked, points)))
        for name, text, kind, points in msgpack.unpackb(raw)
    ]


class Merger:
    """Puts the series of several processes together.

    Args:
        held: names of gauges that each process has of its own.
    """

    def __init__(self, held: Collection[str]) -> None:
        self._held = frozenset(held)

    def rule(self, family: Family) -> Rule:
        """How the values of a family come together."""
        if family.name.startswith(_OF_PROCESS):
            return Rule.EACH
        if family.kind in _COUNTS:
            return Rule.COUNTED
        return Rule.HELD if family.name in self._held else Rule.KNOWN

    def add_counts(self, families: Iterable[Family], before: Iterable[Family]) -> list[Family]:
        """Adds to the counts of a process those of processes that had its place before."""
        earlier = {family.name: family for family in before}
        result = list(families)
        for family in result:
            if self.rule(family) is Rule.COUNTED and family.name in earlier:
                family.add(earlier[family.name])
        return result

    def merge(
        self,
        own: tuple[int, Iterable[Family]],
        others: Mapping[int, Iterable[Family]],
        live: Collection[int],
    ) -> list[Family]:
        """The series of all processes as one.

        Args:
            own: the number of the process that is asked, and its families.
            others: those of the others, by their numbers.
            live: the numbers of those that have just answered.
        """
        number, families = own
        total = {
            family.name: family.labelled(number) if self.rule(family) is Rule.EACH else family
            for family in families
        }
        for other, theirs in others.items():
            for family in theirs:
                self._add(total, family, other, is_live=other in live)
        return list(total.values())

    def _add(self, total: dict[str, Family], family: Family, worker: int, *, is_live: bool) -> None:
        rule = self.rule(family)
        if rule is Rule.KNOWN or family.name not in total:
            return
        if rule is Rule.COUNTED or (rule is Rule.HELD and is_live):
            total[family.name].add(family)
        elif rule is Rule.EACH and is_live:
            total[family.name].add(family.labelled(worker))


def _named_at(point: Point) -> float:
    return 0.0 if point.exemplar is None else float(point.exemplar.timestamp or 0)


def _packed_family(family: Family) -> tuple[Any, ...]:
    points = [_packed(*item) for item in family.points.items()]
    return family.name, family.text, family.kind, points


def _packed(key: _Key, point: Point) -> tuple[Any, ...]:
    name, labels = key
    if (exemplar := point.exemplar) is None:
        return name, labels, point.value, None
    return name, labels, point.value, (exemplar.labels, exemplar.value, exemplar.timestamp)


def _unpacked(item: Any) -> tuple[_Key, Point]:
    name, labels, value, named = item
    exemplar = None if named is None else Exemplar(*named)
    return (name, tuple((key, text) for key, text in labels)), Point(value, exemplar)
