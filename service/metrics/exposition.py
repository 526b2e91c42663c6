"""Shows series to scrapers: in Prometheus' text format, or in OpenMetrics to those that ask for it.

Some counters have names without `_total`, since dashboards know them by these. The text format does
not mind. OpenMetrics has no such counters, and Prometheus prefers OpenMetrics: there they are of
unknown type, so that a series has the same name in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import (
    CONTENT_TYPE_LATEST,
)
from prometheus_client.openmetrics.exposition import (
    generate_latest as generate_openmetrics,
)

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = CONTENT_TYPE_LATEST

_OPENMETRICS = "application/openmetrics-text"
_VERSIONS = (None, "0.0.1", "1.0.0")  # that a scraper may ask for, and of which 1.0.0 is one
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


class Source(Protocol):
    """What has series: a registry, or several of them put together."""

    def collect(self) -> Iterable[Metric]:
        """Its series now."""


@dataclass(frozen=True, slots=True)
class Collected:
    """Series that were collected before."""

    metrics: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        """See Source."""
        return self.metrics


class Exposition:
    """Shows series.

    Args:
        source: what there is.
        plain: what the names of counters begin with that have no `_total`.
    """

    def __init__(self, source: Source, plain: str) -> None:
        self._source = source
        self._plain = plain
        self._suffix = re.compile(rf"(?m)^((?:# \w+ )?{plain}\w+)_total\b".encode())

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """The content type and the text of all series, in the form that `Accept` asks for."""
        if prefers_openmetrics(accept):
            shown: bytes = generate_openmetrics(self)  # type: ignore[no-untyped-call]
            return OPENMETRICS_TYPE, shown
        return TEXT_TYPE, self._suffix.sub(rb"\1", generate_latest(self._source))

    def collect(self) -> Iterator[Metric]:
        """The source's series as OpenMetrics has them."""
        for family in self._source.collect():
            is_plain = family.type == "counter" and family.name.startswith(self._plain)
            yield _untyped(family) if is_plain else family


def prefers_openmetrics(accept: str) -> bool:
    """Whether a header `Accept` asks for OpenMetrics, and for nothing else more than for that."""
    openmetrics = text = 0.0
    for media_range in accept.split(","):
        kind, *rest = (part.strip().lower() for part in media_range.split(";"))
        parameters = dict(_pair(part) for part in rest)
        quality = _quality(parameters.get("q", "1"))
        if kind == _OPENMETRICS and parameters.get("version") in _VERSIONS:
            openmetrics = max(openmetrics, quality)
        elif kind == "text/plain":
            text = max(text, quality)
    return openmetrics > 0 and openmetrics >= text


def _pair(parameter: str) -> tuple[str, str]:
    name, _, value = parameter.partition("=")
    return name.strip(), value.strip().strip('"')


def _quality(text: str) -> float:
    return float(text) if _QUALITY.fullmatch(text) else 0.0


def _untyped(counter: Metric) -> Metric:
    family = Metric(counter.name, counter.documentation, "unknown")
    for sample in counter.samples:
        family.add_sample(counter.name, sample.labels, sample.value)
    return family
