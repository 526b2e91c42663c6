"""Sends spans to a collector, in the background: a collector that is gone holds up nothing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Mapping
from contextlib import suppress

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased

from ..launch.otlp import TraceExport
from .tracer import CallTracer

_SCOPE = "tokenwire"
_FLUSH_S = 2.0  # how long the last spans may take at the end


class TraceSender:
    """The SDK's parts that collect spans and send them.

    Args:
        export: where to.
        attributes: of this process, in the resource of its spans.

    Raises:
        ValueError: one of OpenTelemetry's variables has a value that cannot be used.
    """

    def __init__(self, export: TraceExport, attributes: Mapping[str, str] | None = None) -> None:
        try:
            self._processor = BatchSpanProcessor(_exporter(export))
        except Exception as error:  # the SDK raises what comes to its mind
            raise ValueError(f"traces cannot be sent: {error}") from error
        resource = Resource.create(
            {SERVICE_NAME: export.service_name, SERVICE_VERSION: _version()}
        ).merge(Resource(dict(attributes or {})))
        self._direct = TracerProvider(resource=resource, shutdown_on_exit=False)
        # The gateway has chosen by the same rule, and must not be contradicted.
        self._behind_gateway = TracerProvider(
            ParentBased(self._direct.sampler), resource, shutdown_on_exit=False
        )
        for provider in (self._direct, self._behind_gateway):
            provider.add_span_processor(self._processor)

    def tracer(self, model_id: str, *, captures_content: bool) -> CallTracer:
        """What makes the spans of calls."""
        return CallTracer(
            self._direct.get_tracer(_SCOPE, _version()),
            self._behind_gateway.get_tracer(_SCOPE, _version()),
            model_id,
            captures_content=captures_content,
        )

    async def close(self) -> None:
        """Sends what is left, as far as the collector takes it in time."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        # Not one of the loop's own threads: those are waited for at the end.
        threading.Thread(target=flush, daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await sent.wait()


def _exporter(export: TraceExport) -> SpanExporter:
    """What speaks to the collector; it takes time limit and compression by itself."""
    if export.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(**export.options)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter(**export.options)


def _version() -> str:
    try:
        return importlib.metadata.version("tokenwire")
    except importlib.metadata.PackageNotFoundError:
        return ""
