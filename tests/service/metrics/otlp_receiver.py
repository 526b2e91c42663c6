"""A collector: OTLP's own service for metrics, over gRPC or HTTP, which keeps what it is sent."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as pb_grpc

Received = queue.SimpleQueue[pb.ExportMetricsServiceRequest]


class _Servicer(pb_grpc.MetricsServiceServicer):  # type: ignore[misc]
    def __init__(self, received: Received) -> None:
        self._received = received

    def Export(self, request: Any, _: Any) -> Any:
        self._received.put(request)
        return pb.ExportMetricsServiceResponse()


@contextmanager
def grpc_receiver() -> Iterator[tuple[str, Received]]:
    """A receiver's URL, and what it gets."""
    received: Received = queue.SimpleQueue()
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_MetricsServiceServicer_to_server(_Servicer(received), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[tuple[str, Received]]:
    """The same over HTTP."""
    received: Received = queue.SimpleQueue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/metrics"
            received.put(pb.ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def histograms(request: pb.ExportMetricsServiceRequest) -> dict[str, list[Any]]:
    """The data points of each histogram, by its name."""
    return {
        metric.name: list(metric.histogram.data_points)
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def attributes(item: Any) -> dict[str, str]:
    """The attributes of a data point or a resource."""
    return {pair.key: pair.value.string_value for pair in item.attributes}
