"""What scrapers get: the text format, or OpenMetrics, with the same names of series in both."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from service.metrics.exposition import OPENMETRICS_TYPE, TEXT_TYPE, Exposition, prefers_openmetrics
from service.metrics.histogram import HistogramFamily

# What Prometheus 2.42 and 3 send.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,*/*;q=0.2"
)


@pytest.fixture
def exposition() -> Exposition:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    Counter("old_count", "Plain", registry=registry).inc(3)
    Counter("old_failure", "Plain, labelled", ["err"], registry=registry).labels("a").inc(2)
    Counter("new", "Usual", registry=registry).inc(5)
    Gauge("old_size", "Gauge", registry=registry).set(7)
    HistogramFamily("old_seconds", "Durations", (0.1, 1.0), registry).of().observe(
        0.5, trace_id="0af7"
    )
    return Exposition(registry, plain="old_")


def samples(text: bytes) -> dict[str, float]:
    """The values by name and labels, as they are written."""
    lines = [line.partition(" # ")[0] for line in text.decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_series_have_the_same_names_and_values_in_both_forms(exposition: Exposition) -> None:
    text_type, text = exposition.render()
    openmetrics_type, openmetrics = exposition.render(PROMETHEUS_2)
    assert (text_type, openmetrics_type) == (TEXT_TYPE, OPENMETRICS_TYPE)
    assert samples(text) == samples(openmetrics)
    assert {"old_count", 'old_failure{err="a"}', "new_total", "old_size"} <= set(samples(text))


def test_both_forms_can_be_read_by_strict_readers(exposition: Exposition) -> None:
    names = {"old_count", "old_failure", "new", "old_size", "old_seconds"}
    assert {item.name for item in read_text(exposition.render()[1].decode())} == names
    shown = exposition.render(OPENMETRICS_TYPE)[1].decode()
    assert {item.name for item in read_openmetrics(shown)} == names


def test_only_openmetrics_has_examples(exposition: Exposition) -> None:
    assert b"0af7" not in exposition.render()[1]
    families = read_openmetrics(exposition.render(PROMETHEUS_3)[1].decode())
    found = [sample.exemplar for family in families for sample in family.samples]
    assert [item.labels for item in found if item is not None] == [{"trace_id": "0af7"}]


def test_plain_counters_are_counters_in_the_text_format(exposition: Exposition) -> None:
    text = exposition.render()[1].decode()
    assert "# HELP old_count Plain\n# TYPE old_count counter\nold_count 3.0\n" in text
    assert '# TYPE old_failure counter\nold_failure{err="a"} 2.0\n' in text
    assert "# TYPE new_total counter\nnew_total 5.0\n" in text


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ('Application/OpenMetrics-Text; version="0.0.1"', True),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0.9,text/plain;q=0.3", True),
        ("application/openmetrics-text;q=many", False),
        (";;,,=", False),
    ],
)
def test_openmetrics_is_for_those_that_ask_for_it(accept: str, expected: bool) -> None:
    assert prefers_openmetrics(accept) is expected
