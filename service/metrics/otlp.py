"""Metrics pushed by OTLP.

The libraries are loaded only where metrics are pushed; they read OpenTelemetry's variables about
time limits, interval and temporality by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..launch.otlp import Export

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter


def make_provider(export: Export, attributes: Mapping[str, str] | None = None) -> MeterProvider:
    """Pushes what its meters are told, until it is shut down.

    Args:
        export: where to, and how.
        attributes: of this process, in the resource of all that it pushes.

    Raises:
        ValueError: a variable has no possible value.
    """
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    try:
        reader = PeriodicExportingMetricReader(_exporter(export))
    except Exception as error:  # the SDK raises what comes to its mind
        raise ValueError(f"metrics cannot be pushed: {error}") from error
    resource = Resource.create({**(attributes or {}), SERVICE_NAME: export.service_name})
    return MeterProvider([reader], resource, shutdown_on_exit=False)


def _exporter(export: Export) -> MetricExporter:
    """What speaks to the collector."""
    if export.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
            OTLPMetricExporter as GrpcExporter,
        )

        return GrpcExporter(**export.options)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
        OTLPMetricExporter as HttpExporter,
    )

    return HttpExporter(**export.options)
