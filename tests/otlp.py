"""A real receiver of traces and metrics, over gRPC or HTTP, and the traces as trees."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from tests.certificates import Pair

WAIT_S = 60.0


@dataclass(frozen=True)
class Event:
    """Something that happened within a span; `at` in ns since 1970."""

    name: str
    at: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """A span as it was received; times in ns since 1970."""

    name: str
    service: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: tuple[Event, ...]
    status: int
    message: str
    state: str
    resource: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tls:
    """What a receiver shows, and the authority of those whom it lets in."""

    own: Pair
    authority: Path

    def credentials(self) -> Any:
        """Those of a gRPC port."""
        pair = (self.own.key.read_bytes(), self.own.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair], self.authority.read_bytes(), require_client_auth=True
        )

    def context(self) -> ssl.SSLContext:
        """That of an HTTP port."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.own.certificate, self.own.key)
        context.load_verify_locations(self.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


class Collector:
    """What a receiver has received so far.

    Attributes:
        url: where it is.
        spans: those received.
        metrics: the last of each that was received, by the names of its service and its own.
        headers: of all exports of spans.
    """

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.metrics: dict[tuple[str, str], Any] = {}
        self.headers: list[dict[str, str]] = []
        self._changed = threading.Condition()

    def take(self, request: pb.ExportTraceServiceRequest, headers: Mapping[str, str]) -> None:
        """Notes the spans of an export."""
        found = [
            _span(span, attributes(group.resource))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self.headers.append(dict(headers))
            self.spans += found
            self._changed.notify_all()

    def take_metrics(self, request: metrics_pb.ExportMetricsServiceRequest) -> None:
        """Notes the metrics of an export."""
        found = {
            (attributes(group.resource)["service.name"], metric.name): metric
            for group in request.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
        }
        with self._changed:
            self.metrics |= found
            self._changed.notify_all()

    def points(self, service: str, name: str) -> list[Any]:
        """The data points of a histogram."""
        return list(self.metrics[service, name].histogram.data_points)

    def wait(self, is_there: Callable[[list[Span]], bool], what: str) -> list[Span]:
        """All spans, once they are as they have to be.

        Raises:
            AssertionError: they never are; the text names `what`.
        """
        deadline = time.monotonic() + WAIT_S
        with self._changed:
            while not is_there(self.spans):
                left = deadline - time.monotonic()
                assert left > 0, f"not received: {what}; there are {[s.name for s in self.spans]}"
                self._changed.wait(left)
            return list(self.spans)

    def trace(self, trace_id: str, root: str) -> list[Span]:
        """The spans of a trace, by their starts, once the one of this name is among them."""

        def of_trace(spans: list[Span]) -> list[Span]:
            return [span for span in spans if span.trace_id == trace_id]

        spans = self.wait(
            lambda spans: any(span.name == root for span in of_trace(spans)), f"{root} {trace_id}"
        )
        return sorted(of_trace(spans), key=lambda span: span.start)


def children(spans: list[Span], parent: Span | str) -> list[Span]:
    """The spans right below a span, or below the id of one that is not here."""
    parent_id = parent if isinstance(parent, str) else parent.span_id
    return [span for span in spans if span.parent_id == parent_id]


def tree(spans: list[Span], parent: Span | str) -> dict[str, Any]:
    """The names of all spans below one."""
    return {span.name: tree(spans, span) for span in children(spans, parent)}


@contextmanager
def grpc_collector(
    *, serves: Callable[[], object] = lambda: None, tls: Tls | None = None
) -> Iterator[Collector]:
    """A collector with OTLP's own gRPC services; `serves` is called before each answer."""
    collector = Collector()

    class Servicer(pb_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> pb.ExportTraceServiceResponse:
            serves()
            collector.take(request, dict(context.invocation_metadata()))
            return pb.ExportTraceServiceResponse()

    class Metrics(metrics_grpc.MetricsServiceServicer):
        def Export(self, request: Any, _: Any) -> metrics_pb.ExportMetricsServiceResponse:
            collector.take_metrics(request)
            return metrics_pb.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
    metrics_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    if tls is None:
        collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        port = server.add_secure_port("127.0.0.1:0", tls.credentials())
        collector.url = f"https://localhost:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)


@contextmanager
def http_collector(*, tls: Tls | None = None) -> Iterator[Collector]:
    """A collector with OTLP over HTTP."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0)) or self._chunks()
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                headers = {name.lower(): value for name, value in self.headers.items()}
                collector.take(pb.ExportTraceServiceRequest.FromString(body), headers)
            elif self.path == "/v1/metrics":
                collector.take_metrics(metrics_pb.ExportMetricsServiceRequest.FromString(body))
            self.send_response(200 if self.path in ("/v1/traces", "/v1/metrics") else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def _chunks(self) -> bytes:
            """A body of chunks, as Envoy sends it."""
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}"
    if tls is not None:
        # Hands are shaken where a request is read, in a thread of its connection.
        server.socket = tls.context().wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        collector.url = f"https://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        service=resource.get("service.name", ""),
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=attributes(span),
        events=tuple(
            Event(event.name, event.time_unix_nano, attributes(event)) for event in span.events
        ),
        status=span.status.code,
        message=span.status.message,
        state=span.trace_state,
        resource=resource,
    )


def attributes(item: Any) -> dict[str, Any]:
    """The attributes of anything that has some."""
    return {pair.key: _value(pair.value) for pair in item.attributes if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)
