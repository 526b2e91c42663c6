"""Histograms for the hot path: many equal observations cost as much as one.

A step gives all its sequences their tokens at the same time, so most of what is observed of them is
equal. `prometheus_client.Histogram` takes one value at a time, and compares it with all bounds.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import Exemplar, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Histogram:
    """Counts of values by size, for one set of label values.

    One thread observes; others may read at the same time.

    Args:
        bounds: upper bounds of the buckets, ascending, without infinity.
    """

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, count: int = 1, trace_id: str = "") -> None:
        """Adds a value `count` times; `trace_id` names a trace in which it was observed."""
        index = bisect_left(self.bounds, value)
        self.counts[index] += count
        self.total += value * count
        if trace_id:
            self.exemplars[index] = Exemplar({"trace_id": trace_id}, value, time.time())


class HistogramFamily(Collector):
    """The histograms of one name, by the value of a label.

    Args:
        name: of the series.
        text: what it means.
        bounds: upper bounds of the buckets, ascending, without infinity.
        registry: what shows it.
        label: the label's name; without one there is one histogram.
        values: of the label, as far as they are known.
    """

    def __init__(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        registry: CollectorRegistry,
        label: str = "",
        values: Iterable[str] = ("",),
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = tuple(bounds)
        self._edges = [*map(floatToGoString, self._bounds), "+Inf"]
        self._label = label
        self._histograms = {value: Histogram(self._bounds) for value in values}
        registry.register(self)

    def of(self, value: str = "") -> Histogram:
        """The histogram of a value of the label, which may be a new one."""
        histogram = self._histograms.get(value)
        if histogram is None:
            histogram = self._histograms[value] = Histogram(self._bounds)
        return histogram

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        labels = [self._label] if self._label else []
        family = HistogramMetricFamily(self._name, self._text, labels=labels)
        for value, histogram in list(self._histograms.items()):
            sums = itertools.accumulate(list(histogram.counts))
            exemplars = dict(histogram.exemplars)
            buckets = [
                (edge, float(count), exemplars.get(index))
                for index, (edge, count) in enumerate(zip(self._edges, sums, strict=True))
            ]
            family.add_metric([value] if labels else [], buckets, histogram.total)  # type: ignore[arg-type]  # None is no exemplar
        yield family
