"""Metrics pushed by OTLP, set up by OpenTelemetry's own environment variables and by nothing else.

They are pushed where `OTEL_METRICS_EXPORTER` is `otlp`, or where it is not set and an endpoint is.
The libraries are loaded only then; they read the other variables (headers, certificates, time
limits, interval, temporality) by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExporter

_EXPORTER = "OTEL_METRICS_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

SERVICE_NAME = "tokenwire"  # unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES says otherwise


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether metrics are to be pushed.

    Raises:
        ValueError: by an exporter that there is not.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get(_EXPORTER, "").strip()
    if exporter in ("otlp", "none"):
        return exporter == "otlp"
    if exporter:
        raise ValueError(f"{_EXPORTER} must be otlp or none. Given: {exporter}")
    return any(environment.get(name, "").strip() for name in _ENDPOINTS)


def make_provider(environment: Mapping[str, str]) -> MeterProvider:
    """Pushes what its meters are told, until it is shut down.

    Raises:
        ValueError: a variable has no possible value.
    """
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import SERVICE_NAME as NAME
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create()
    if str(resource.attributes[NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({NAME: SERVICE_NAME}))
    reader = PeriodicExportingMetricReader(_exporter(environment))
    return MeterProvider([reader], resource, shutdown_on_exit=False)


def _exporter(environment: Mapping[str, str]) -> MetricExporter:
    """The exporter of the wanted protocol: gRPC, unless a variable says otherwise.

    Raises:
        ValueError: there is no such protocol.
    """
    given = ((name, environment.get(name, "").strip()) for name in _PROTOCOLS)
    name, protocol = next(((name, value) for name, value in given if value), ("", "grpc"))
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
            OTLPMetricExporter as GrpcExporter,
        )

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
            OTLPMetricExporter as HttpExporter,
        )

        return HttpExporter()
    raise ValueError(f"{name} must be grpc or http/protobuf. Given: {protocol}")
