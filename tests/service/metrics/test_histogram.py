"""Histograms show what those of prometheus_client show of the same values."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics.histogram import HistogramFamily

BOUNDS = (0.5, 1.0, 4.0)
VALUES = (0.0, 0.5, 0.51, 1.0, 3.0, 4.0, 4.1, 1e9)


def test_values_are_counted_as_prometheus_client_counts_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    family = HistogramFamily("size", "Sizes", BOUNDS, ours, "kind", ["a", "b"])
    peer = prometheus_client.Histogram("size", "Sizes", ["kind"], buckets=BOUNDS, registry=theirs)
    for kind, count in (("a", 1), ("b", 3)):
        for value in VALUES:
            family.of(kind).observe(value, count)
            for _ in range(count):
                peer.labels(kind).observe(value)
    assert generate_latest(ours) == without_created(generate_latest(theirs))


def test_a_family_without_label_has_one_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    HistogramFamily("size", "Sizes", BOUNDS, ours).of().observe(2.0)
    prometheus_client.Histogram("size", "Sizes", buckets=BOUNDS, registry=theirs).observe(2.0)
    assert generate_latest(ours) == without_created(generate_latest(theirs))


def test_a_value_of_the_label_may_come_later() -> None:
    registry = CollectorRegistry()
    family = HistogramFamily("size", "Sizes", BOUNDS, registry, "kind", ())
    family.of("late").observe(2.0)
    assert registry.get_sample_value("size_count", {"kind": "late"}) == 1


def without_created(text: bytes) -> bytes:
    """The text without the times at which series were made, which may be there or not."""
    return b"".join(line for line in text.splitlines(keepends=True) if b"size_created" not in line)
