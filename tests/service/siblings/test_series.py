"""The series of several processes as one: right in sum, whoever dies."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from service.launch.place import Place
from service.metrics.exposition import OPENMETRICS_TYPE, Collected, Exposition
from service.metrics.histogram import HistogramFamily
from service.siblings.series import SharedSeries


class Process:
    """What one process counts, holds and knows."""

    def __init__(self, directory: Path, number: int, count: int = 2) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self.calls = Counter("calls", "Counted", ["code"], registry=registry)
        self.seconds = HistogramFamily("seconds", "Counted", (0.1, 1.0), registry).of()
        self.active = Gauge("active", "Held", registry=registry)
        self.blocks = Gauge("blocks", "Known", registry=registry)
        self.memory = Gauge("process_bytes", "Of each", registry=registry)
        Info("build", "Known", registry=registry).info({"version": "1"})
        self.series = SharedSeries(Place(number, count, directory), registry, ("active",))

    def shown(self, live: Collection[int] = ()) -> dict[str, float]:
        """All values by name and labels."""
        return {
            _spelt(sample.name, sample.labels): sample.value
            for metric in self.series.merged(live)
            for sample in metric.samples
        }


def _spelt(name: str, labels: dict[str, str]) -> str:
    return name + "".join(f" {key}={value}" for key, value in labels.items())


@pytest.fixture
def first(tmp_path: Path) -> Process:
    return Process(tmp_path, 1)


@pytest.fixture
def second(tmp_path: Path) -> Process:
    return Process(tmp_path, 2)


def test_what_each_counts_is_added_up(first: Process, second: Process) -> None:
    first.calls.labels("OK").inc(2)
    second.calls.labels("OK").inc(3)
    second.calls.labels("ABORTED").inc()
    first.seconds.observe(0.05, 2)
    second.seconds.observe(0.5)
    second.series.store()
    shown = first.shown(live={2})
    assert shown["calls_total code=OK"] == 5
    assert shown["calls_total code=ABORTED"] == 1
    assert [shown[f"seconds_bucket le={le}"] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 3]
    assert (shown["seconds_count"], shown["seconds_sum"]) == (3, pytest.approx(0.6))


def test_both_show_the_same(first: Process, second: Process) -> None:
    for process, count in ((first, 1), (second, 4)):
        process.calls.labels("OK").inc(count)
        process.active.set(count)
        process.series.store()
    names = ("calls_total code=OK", "active")
    assert [first.shown({2})[name] for name in names] == [5, 5]
    assert [second.shown({1})[name] for name in names] == [5, 5]


def test_what_is_held_is_that_of_the_living(first: Process, second: Process) -> None:
    first.active.set(1)
    second.active.set(2)
    second.series.store()
    assert first.shown(live={2})["active"] == 3
    assert first.shown(live=())["active"] == 1


def test_what_all_know_is_shown_once(first: Process, second: Process) -> None:
    first.blocks.set(64)
    second.blocks.set(64)
    second.series.store()
    shown = first.shown(live={2})
    assert (shown["blocks"], shown["build_info version=1"]) == (64, 1)


def test_what_is_about_a_process_is_shown_for_each_that_lives(
    first: Process, second: Process
) -> None:
    first.memory.set(10)
    second.memory.set(20)
    second.series.store()
    shown = first.shown(live={2})
    assert (shown["process_bytes worker=1"], shown["process_bytes worker=2"]) == (10, 20)
    assert "process_bytes worker=2" not in first.shown(live=())


def test_no_sum_falls_when_a_process_dies_and_its_place_is_taken(
    tmp_path: Path, first: Process, second: Process
) -> None:
    second.calls.labels("OK").inc(7)
    second.seconds.observe(0.5, 3)
    second.series.store()
    assert first.shown(live={2})["calls_total code=OK"] == 7
    assert first.shown(live=())["calls_total code=OK"] == 7  # it is dead
    again = Process(tmp_path, 2)
    assert first.shown(live=())["calls_total code=OK"] == 7  # it has not been asked
    again.calls.labels("OK").inc()
    again.series.store()
    assert first.shown(live={2})["calls_total code=OK"] == 8
    once_more = Process(tmp_path, 2)
    once_more.series.store()
    shown = first.shown(live={2})
    assert (shown["calls_total code=OK"], shown["seconds_count"]) == (8, 3)


def test_the_last_trace_of_a_bucket_is_named(first: Process, second: Process) -> None:
    first.seconds.observe(0.05, trace_id="older")
    first.seconds.observe(0.5, trace_id="only")
    second.seconds.observe(0.06, trace_id="newer")
    second.series.store()
    metrics = list(first.series.merged({2}))
    text = Exposition(Collected(metrics), "old_").render(OPENMETRICS_TYPE)[1].decode()
    assert {metric.name for metric in read_openmetrics(text)} >= {"seconds", "calls", "build"}
    assert {trace for trace in ("older", "only", "newer") if trace in text} == {"only", "newer"}


def test_a_process_that_never_answered_is_left_out(tmp_path: Path) -> None:
    alone = Process(tmp_path, 3, count=4)
    alone.calls.labels("OK").inc()
    assert alone.shown(live={1})["calls_total code=OK"] == 1


def _types(metrics: list[Metric]) -> dict[str, str]:
    return {metric.name: metric.type for metric in metrics}


def test_types_and_texts_stay(first: Process, second: Process) -> None:
    second.series.store()
    metrics = list(first.series.merged({2}))
    assert _types(metrics) == {
        "calls": "counter",
        "seconds": "histogram",
        "active": "gauge",
        "blocks": "gauge",
        "process_bytes": "gauge",
        "build": "info",
    }
